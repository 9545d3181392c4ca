"""Variables that may be unbound: the error comes where Python has it, after the effects that Python had."""

from ..differential import same


def test_an_effect_before_the_read_happens() -> None:
    same(
        """
        @workflow
        def main(c: bool):
            if c:
                q = 1
            return (note(1), q)
        """,
        "(True,)",
        "(False,)",
    )


def test_an_unknown_global_comes_before_an_unbound_local() -> None:
    same(
        """
        @workflow
        def main():
            return (missing, q)
            for q in ():
                pass
        """
    )


def test_the_variable_of_a_loop_over_nothing() -> None:
    same(
        """
        @workflow
        def main(xs: list[int]):
            for i in []:
                pass
            for j in xs:
                llm.generate(str(j))
            return i if not xs else j
        """,
        "([1, 2],)",
        "([],)",
    )


def test_deleted_on_the_way_round_a_loop() -> None:
    same(
        """
        @workflow
        def main(xs: list[int], d: bool):
            for x in xs:
                del d
                send(x)
        """,
        "([3, 4], True)",
    )


def test_deleted_in_a_try_and_read_by_the_handler() -> None:
    same(
        """
        @workflow
        def main(e: bool):
            n = 2
            while n:
                n -= 1
                try:
                    del e
                    llm.generate("x")
                except UnboundLocalError as err:
                    note(str(err))
            return n
        """,
        "(True,)",
    )


def test_deleted_in_one_arm_of_plain_python() -> None:
    same(
        """
        @workflow
        def main(c: bool):
            x = 1
            if c:
                del x
            llm.generate("a")
            return x
        """,
        "(True,)",
        "(False,)",
    )


def test_an_augmented_assignment_to_an_unbound_variable() -> None:
    same(
        """
        @workflow
        def main(xs: list[int]):
            for i in xs:
                h += note(i)
            return h
        """,
        "([1],)",
        "([],)",
    )


def test_the_name_of_a_handled_error_is_unbound_after_it() -> None:
    same(
        """
        @workflow
        def main():
            err = 1
            try:
                boom(lookup("x"))
                raise ValueError("v")
            except ValueError as err:
                note(str(err))
            return err
        """
    )


def test_a_name_that_is_only_appended_to_is_no_local() -> None:
    same(
        """
        @workflow
        def main():
            nowhere.append(llm.generate("x"))
        """
    )


def test_an_always_taken_read_in_a_fused_run() -> None:
    same(
        """
        @workflow
        def main(c: bool):
            if c:
                x = 1
            a = 1
            b = a + 2
            y = (a, b, x)
            return y
        """,
        "(True,)",
        "(False,)",
    )


def test_a_walrus_in_the_arm_of_a_test_that_is_not_taken() -> None:
    same(
        """
        @workflow
        def main(b: str):
            if b if "p" else (c := True):
                note(b)
            return c
        """,
        "('x',)",
    )
