"""The window of the confidence breach counter over a worker's counters."""

from services.controller.breach_window import BreachWindow


def test_window_is_the_shortest_stretch_that_holds_its_tokens() -> None:
    window = BreachWindow(100)
    for step in range(20):
        # The first half of the tokens are unsure.
        window.add(step * 30, min(step, 10) * 30)
    assert window.tokens == 120
    assert window.high_exit_tokens == 0


def test_window_counts_what_is_unsure_in_it() -> None:
    window = BreachWindow(100)
    window.add(1000, 500)
    assert (window.tokens, window.high_exit_tokens) == (0, 0)
    window.add(1060, 530)
    window.add(1110, 570)
    assert (window.tokens, window.high_exit_tokens) == (110, 70)


def test_window_begins_anew_with_a_new_plan_or_a_new_process() -> None:
    window = BreachWindow(100)
    window.add(0, 0)
    window.add(150, 150)
    window.clear()
    assert window.tokens == 0
    window.add(200, 160)
    assert (window.tokens, window.high_exit_tokens) == (50, 10)
    window.add(10, 0)
    assert window.tokens == 0
