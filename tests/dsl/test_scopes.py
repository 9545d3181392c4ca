"""Names mean what Python says: comprehensions, lambdas, nested functions, globals that change."""

from ..differential import same


def test_the_first_iterable_of_a_comprehension_is_outside_it() -> None:
    same(
        """
        @workflow
        def main(b: list[list[int]]):
            for k in b:
                found = [d for d in k for k in (1, 2)]
            return found, k
        """,
        "([[1], [2, 3]],)",
    )


def test_a_comprehension_variable_that_is_called_like_a_tool() -> None:
    same(
        """
        @workflow
        def main(xs: list[str]):
            upper = [str.upper, str.title]
            return [lookup(x) for lookup in upper for x in xs], lookup("q")
        """,
        "(['a b'],)",
    )


def test_a_result_is_not_called_like_a_global_that_stands_beside_it() -> None:
    same(
        """
        value = "global"

        @workflow
        def main(b: str, c: bool):
            if c:
                x = "x"
            test = lookup(b) == lookup(*(b, 3))
            return test, value + x, (value, llm.generate(b))
        """,
        "('q', True)",
        "('q', False)",
    )


def test_walrus_inside_a_comprehension() -> None:
    same(
        """
        @workflow
        def main(xs: list[str], c: bool):
            ys = [y for x in xs if (y := x.strip())]
            z = (w := len(ys)) + w
            q = (c and (v := 3)) or 5
            llm.generate(str(q))
            return ys, z, w, q, y, v
        """,
        "(['a ', ''], True)",
        "(['a '], False)",
        "([], True)",
    )


def test_a_nested_function_that_appends_to_a_captured_list() -> None:
    same(
        """
        @workflow
        def main(e: int):
            held = [e, 2]
            def keep(q, n=e):
                held.append(q)
                return n
            note(keep(4))
            llm.generate("x")
            return held
        """,
        "(1,)",
    )


def test_a_global_that_the_workflow_counts_up() -> None:
    same(
        """
        N = 0

        @workflow
        def main(x: str):
            global N
            N = 0
            for _ in range(2):
                N += 1
                lookup(x)
                note(N)
            return N
        """,
        "('a',)",
    )


def test_arguments_of_gather_are_computed_before_any_operation_starts() -> None:
    same(
        """
        @workflow
        async def main(c: str):
            a, b = await asyncio.gather(llm.generate(note(c)), llm.generate(note("b")))
            return a, b, await asyncio.gather(*[llm.generate(cut(q)) for q in each(["x", "y"])])
        """,
        "('a',)",
        "('éß éß',)",
    )


def test_a_wrong_type_is_refused_when_it_gets_there() -> None:
    same(
        """
        @workflow
        def main(x):
            if isinstance(x, str):
                return llm.generate(x)
            put(1)
            return docs.search(x, k=1)
        """,
        "('a',)",
        "([1],)",
    )


def test_nested_workflows_with_defaults_and_keywords() -> None:
    same(
        """
        @workflow
        def inner(a: str, b: int = 3, *, c: bool = False):
            return f"{llm.generate(a)}{b:>3}{c!r}"

        @workflow
        def main(s: str):
            return inner(s), inner(a=s, c=True), inner(s, 5)
        """,
        "('s',)",
    )


def test_bounded_recursion() -> None:
    same(
        """
        @workflow
        def countdown(n: int, s: str) -> str:
            if n <= 0:
                return llm.generate(s)
            note(n)
            return countdown(n - 1, f"{s}{n}") + str(n)

        @workflow
        def main(n: int):
            return countdown(n, "x")
        """,
        "(4,)",
        "(0,)",
    )
