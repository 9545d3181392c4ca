#!/bin/sh
# Put the pinned torch into a virtual environment: the CPU build, unless FLOWC_GPU=1 asks for CUDA.
#     sh constraints/torch.sh .venv/bin/python
#
# On Linux a plain `pip install torch` brings several GB of CUDA packages with it. So there the CPU build is asked for
# by its exact version, `+cpu`, which no CUDA build satisfies. It is looked for
#   1. wherever pip looks on this machine: the registry, PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, pip.conf;
#   2. at PyTorch's own index of CPU builds, whose address uv knows (`--torch-backend=cpu`).
# Found at neither, the set-up stops and says what can be done. It never takes the CUDA build instead.
# On other systems the registry's build is the CPU build.
set -eu

python=$1
here=$(dirname "$0")
pins=$here/constraints.txt
pin=$(sed -n 's/^torch==//p' "$pins")

installed() {
    "$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true
}

pip_install() {
    "$python" -m pip install -qq --disable-pip-version-check --constraint "$pins" "$@"
}

if [ "${FLOWC_GPU:-}" = 1 ]; then
    case $(installed) in *+cpu) "$python" -m pip uninstall --quiet --yes torch ;; esac
    pip_install "torch==$pin"
    exit
fi

case $(installed) in "$pin" | "$pin"+*) exit ;; esac # never replaces a build that somebody chose

if [ "$(uname -s)" != Linux ]; then
    pip_install "torch==$pin"
    exit
fi

if command -v nvidia-smi >/dev/null 2>&1; then
    echo "flowc: taking torch's CPU build; with FLOWC_GPU=1, make takes the CUDA build (several GB)" >&2
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
if pip_install "torch==$pin+cpu" >"$log" 2>&1; then
    exit
fi
# Only "there is no such build" leads on; a full disk or a dead network is shown as pip says it.
grep -Eq 'No matching distribution found for torch|Cannot install torch==' "$log" || { cat "$log" >&2; exit 1; }

echo "flowc: pip knows no CPU build of torch $pin here; asking PyTorch's own index, through uv" >&2
if pip_install uv && "$python" -m uv pip install --quiet --python "$python" --constraint "$pins" \
    --torch-backend=cpu "torch==$pin"; then
    exit
fi
cat >&2 <<EOF
flowc: no CPU build of torch $pin was found, and the CUDA build (several GB) is not taken unasked. Either
  - name a place that has it:   PIP_EXTRA_INDEX_URL=... make demo   (PyTorch's install page gives the address), or
                                PIP_FIND_LINKS=/folder/with/the/wheel make demo
  - take the CUDA build:        FLOWC_GPU=1 make demo
EOF
exit 1
