"""Early exits out of everything, `else` of loops, `finally`, and the lines of errors."""

from ..differential import same


def test_return_in_try_runs_a_finally_with_loops_of_its_own() -> None:
    same(
        """
        @workflow
        def main(a: str):
            try:
                return lookup(a)
            finally:
                for i in range(3):
                    if put(i) == 2:
                        break
                try:
                    lookup(bool)
                finally:
                    note("end")
            note("not reached")
        """,
        "('a',)",
        "('éß',)",
    )


def test_break_and_continue_through_finally() -> None:
    same(
        """
        @workflow
        def main(n: int):
            seen = []
            for i in range(n):
                try:
                    if i == 1:
                        continue
                    if put(i) > 3:
                        break
                    seen.append(i)
                finally:
                    note(i)
            else:
                seen.append("else")
            return seen
        """,
        "(2,)",
        "(9,)",
    )


def test_return_out_of_nested_loops_with_else() -> None:
    same(
        """
        @workflow
        def main(words: list[str]):
            for w in words:
                n = 2
                while n:
                    n -= 1
                    if llm.choose(w + str(n), ["yes", "no"]) == "yes":
                        return w, n
                else:
                    note(w)
            else:
                return "none"
        """,
        "(['a', 'b', 'c'],)",
        "([],)",
    )


def test_an_error_in_the_middle_of_a_long_expression_has_its_own_line() -> None:
    same(
        """
        @workflow
        def main(e: list[str]):
            f = [
                put(3),
                e[0],
            ]
            return f
        """,
        "([],)",
    )


def test_handlers_are_tried_in_order_and_errors_chain() -> None:
    same(
        """
        @workflow
        def main(x: int):
            try:
                try:
                    boom(x)
                    send(x)
                except OSError as e:
                    raise OwnError("again") from e
                except (ValueError, KeyError):
                    raise
                else:
                    note("fine")
            except OwnError as e:
                return str(e), type(e.__cause__).__name__
            finally:
                note("last")
            return x
        """,
        *(f"({i},)" for i in range(8)),
    )


def test_a_handler_sees_what_plain_python_had_bound_when_it_failed() -> None:
    same(
        """
        @workflow
        def main(e: int):
            a = [3].copy()
            n = 0
            try:
                for a, j in zip(a, "v"):
                    n += 1
                    assert e
                if e:
                    n = 5
                    assert a == 4
                lookup(a)
            except AssertionError:
                n += 10
            return a, n
        """,
        "(0,)",
        "(1,)",
    )


def test_a_loop_whose_test_binds() -> None:
    same(
        """
        @workflow
        def main(n: int):
            total = 0
            while (n := n - 1) > 0:
                if n == 2:
                    continue
                total += put(n)
            return n, total
        """,
        "(5,)",
        "(0,)",
    )


def test_an_annotation_that_lies_still_raises_in_place() -> None:
    same(
        """
        @workflow
        def main(g: str):
            if g:
                b = liar(3) + g
            put("after")
            return g
        """,
        "('x',)",
    )
