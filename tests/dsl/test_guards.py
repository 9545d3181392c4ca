"""A capture holds while the names that it relied on mean the same; after that the workflow is captured anew."""

from ..differential import HEAD, Loaded, direct_host, same
from ..program_world import interpret_graph
from ..programs import Program


def load(source: str) -> Loaded:
    return Loaded(Program(HEAD + source, (), False))


def test_a_constant_that_is_rebound_between_calls() -> None:
    loaded = load("LIMIT = 2\n\n@workflow\ndef main(x: str):\n    return [f'{x}{LIMIT}' for _ in range(LIMIT)]\n")
    main = loaded.module.main
    first = main.graph()
    assert main.graph() is first
    assert interpret_graph(first, ("a",)) == ["a2", "a2"]
    vars(loaded.module)["LIMIT"] = 1
    assert main.graph() is not first
    assert interpret_graph(main.graph(), ("a",)) == ["a1"]
    loaded.close()


def test_a_tool_that_is_replaced_between_calls() -> None:
    loaded = load("@workflow\ndef main(x: str):\n    return lookup(x)\n")
    main = loaded.module.main
    assert [op.name for op in main.graph().body.ops] == ["tool"]
    vars(loaded.module)["lookup"] = lambda x: f"patched {x}"
    graph = main.graph()
    assert [op.name for op in graph.body.ops] == ["py"]
    assert interpret_graph(graph, ("a",)) == "patched a"
    loaded.close()


def test_a_resource_in_a_closure() -> None:
    loaded = load(
        "def make(model):\n    @workflow\n    def inner(x: str):\n        return model.generate(x)\n"
        "    return inner\n\nmain = make(llm)\n"
    )
    with direct_host():
        main = loaded.module.main
        assert [op.name for op in main.graph().body.ops] == ["generate"]
        assert interpret_graph(main.graph(), ("a",)) == main.eager("a")
    loaded.close()


def test_a_global_that_the_module_itself_rebinds_is_read_live() -> None:
    same(
        """
        COUNT = 1

        def more():
            global COUNT
            COUNT += 1

        @workflow
        def main(x: str):
            global COUNT
            COUNT = 1
            a = f"{COUNT}"
            more()
            lookup(x)
            return a, f"{COUNT}"
        """,
        "('a',)",
    )
