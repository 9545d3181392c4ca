"""Lists as values: appending in a loop is understood, and whoever shares the list still sees it."""

from flowc.ir.core import walk

from ..differential import HEAD, Loaded, same
from ..programs import Program


def test_appending_to_the_list_that_the_loop_runs_over() -> None:
    same(
        """
        @workflow
        def main():
            xs = ["a", "b"]
            for x in xs:
                if len(xs) < 5:
                    xs.append(lookup(x))
            return xs
        """
    )


def test_appending_to_a_list_under_enumerate() -> None:
    same(
        """
        @workflow
        def main():
            xs = [1, 2]
            for i, x in enumerate(xs):
                if i < 3:
                    xs.append(put(x))
            return xs
        """
    )


def test_an_alias_through_a_tuple() -> None:
    same(
        """
        @workflow
        def main(c: bool):
            g = llm.generate("A b").splitlines()
            h = (g, c)[0]
            h.append("z")
            return g, h, g is h
        """,
        "(True,)",
    )


def test_an_alias_through_a_nested_list() -> None:
    same(
        """
        @workflow
        def main():
            rows = [[1], [2]]
            first = rows[0]
            first.append(put(1))
            for row in rows:
                row.append(put(2))
            return rows, first
        """
    )


def test_a_bound_method_taken_before_the_argument_is_computed() -> None:
    same(
        """
        @workflow
        def main():
            a = []
            a.insert(0, put("x"))
            a.append(4)
            return a
        """
    )


def test_a_copy_with_a_star_sees_what_was_stored_before() -> None:
    same(
        """
        @workflow
        def main(d):
            llm.generate("t")
            d[0] = same
            put([*d, 0])
            return len(d)
        """,
        "([1],)",
    )


def test_a_list_that_a_called_workflow_changes() -> None:
    same(
        """
        @workflow
        def longer(xs: list[str]):
            xs.append(llm.generate("q"))
            return xs

        @workflow
        def main():
            a = ["x"]
            b = longer(a)
            return a, b, a is b
        """
    )


def test_a_fresh_list_given_to_a_workflow() -> None:
    same(
        """
        @workflow
        def total(xs: list[int], ys: list[list[int]]):
            return sum(xs) + len(ys), llm.generate(str(xs))

        @workflow
        def main():
            return total(list([3]), [[1], []]), [total([i], [[i]]) for i in range(2)]
        """
    )


def test_a_list_that_a_helper_keeps() -> None:
    same(
        """
        @workflow
        def main():
            a = []
            hold(a)
            for i in range(3):
                a.append(put(i))
                stir()
            return a
        """
    )


def test_a_loop_that_only_collects_runs_its_turns_at_once() -> None:
    source = """
@workflow
def main(xs: list[str]):
    found = []
    for x in xs:
        found.append(llm.generate(x))
    return found
"""
    same(source, "(['a', 'b'],)")
    loaded = Loaded(Program(HEAD + source, (), False))
    graph = loaded.module.main.graph()
    loaded.close()
    (loop,) = [op for op in walk(graph.body) if op.name == "foreach"]
    assert loop.attr("collects") == 1
    assert len(loop.operands) == 1  # nothing is carried from one turn to the next
