"""Compiles every kernel for a GPU that need not be there, and says what came of it: `python -m
flowc.backends.kernels.aot`.

Triton brings its own assembler, so machine code for compute capability 9.0 (H100, H200) is made on any Linux machine.
One line of JSON a kernel: shared memory, and how often the tensor cores and the asynchronous copies are used in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import block_copy, kv_write, page_scan, paged_attention
from .launch import Launch

SHARED_LIMIT_BYTES = 227 * 1024  # what one thread block may ask for on capability 9.0

_POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of a launch: counts are of instructions in the PTX text."""

    name: str
    seconds: float
    shared_bytes: int
    wgmma: int  # tensor-core products of a whole warp group (Hopper)
    mma_sync: int  # tensor-core products of one warp
    cp_async: int  # copies to shared memory that do not wait
    local_bytes: int  # of memory set aside in the PTX for what has no register
    cubin_bytes: int


def compile_launch(name: str, launch: Launch, *, capability: int = 90) -> Compiled:
    """The launch compiled for a CUDA device of this compute capability, specialised as the launch itself would be.

    As there, integers equal to 1 are compiled in, and pointers and integers that 16 divides are known to be so:
    without that no copy is asynchronous. Tensors are taken to be aligned. Not possible in a process with
    TRITON_INTERPRET=1.
    """
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for position, parameter in enumerate(launch.kernel.arg_names):
        if parameter in launch.constants:
            signature[parameter] = "constexpr"
            constants[parameter] = launch.constants[parameter]
            continue
        value = launch.arguments[parameter]
        if isinstance(value, torch.Tensor):
            signature[parameter] = _POINTER[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter] = "fp32"
        elif value == 1:
            signature[parameter] = "constexpr"
            constants[parameter] = 1
        else:
            signature[parameter] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    began = time.perf_counter()
    made = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    ptx = made.asm["ptx"]
    local = sum(
        int(line.rpartition("[")[2].rpartition("]")[0])
        for line in ptx.splitlines()
        if line.lstrip().startswith(".local")
    )
    return Compiled(
        name,
        round(time.perf_counter() - began, 2),
        made.metadata.shared,
        ptx.count("wgmma.mma_async"),
        ptx.count("mma.sync"),
        ptx.count("cp.async.c"),
        local,
        len(made.asm["cubin"]),
    )


def catalogue() -> Iterator[tuple[str, Launch]]:
    """Every kernel in the configurations that models and indexes ask for, named; nothing is compiled yet."""
    yield from paged_attention.catalogue()
    yield from kv_write.catalogue()
    yield from block_copy.catalogue()
    yield from page_scan.catalogue()


def main(arguments: list[str]) -> int:
    """Compiles what is asked for and prints it; 1 if a kernel asks for more shared memory than there is."""
    parser = argparse.ArgumentParser(prog="python -m flowc.backends.kernels.aot", description=__doc__)
    parser.add_argument("names", nargs="*", help="only kernels whose name holds one of these")
    parser.add_argument("--capability", type=int, default=90, help="compute capability, 90 for 9.0")
    options = parser.parse_args(arguments)
    fits = True
    for name, launch in catalogue():
        if not options.names or any(part in name for part in options.names):
            made = compile_launch(name, launch, capability=options.capability)
            fits &= made.shared_bytes <= SHARED_LIMIT_BYTES
            print(json.dumps(asdict(made)), flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
