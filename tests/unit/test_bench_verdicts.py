"""What follows from results: gates, comparisons, capacity, pages."""

from html.parser import HTMLParser

import numpy as np
import pytest

from policy_client.bench.arrivals import Periodic
from policy_client.bench.capacity import find_capacity
from policy_client.bench.cli import command_line, main
from policy_client.bench.compare import compare
from policy_client.bench.gates import Gates, read_share
from policy_client.bench.report import page
from policy_client.bench.result import Result, save_result
from tests.unit.bench_results import virtual_result

draw = np.random.default_rng(6)


def result_of(scale: float) -> Result:
    return virtual_result(Periodic(20.0), lambda due_s: scale * draw.lognormal(-4, 0.3, len(due_s)))


def test_gates_name_what_is_broken() -> None:
    result = virtual_result(Periodic(10.0), lambda due_s: np.full(len(due_s), 0.12), deadline_ms=100)
    assert Gates(max_p99_ms=130, max_missed=1.0).broken(result) == []
    p99, missed = Gates(max_p99_ms=110, max_missed=0.01).broken(result)
    assert p99 == "p99 is 120 ms, allowed 110 ms"
    assert missed == "100.000% missed the deadline, allowed 1.000%"


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5", 0.5), ("0", 0.0)])
def test_shares_are_read(text: str, share: float) -> None:
    assert read_share(text) == pytest.approx(share)


def test_a_share_above_all_is_refused() -> None:
    with pytest.raises(ValueError, match="got '5'"):
        read_share("5")


def test_two_results_of_one_server_seldom_show_a_difference() -> None:
    results = [result_of(1.0) for _ in range(12)]
    changes = [compare(before, after)[0] for before, after in zip(results[::2], results[1::2], strict=True)]
    assert sum(change.shown for change in changes) <= 2


def test_a_slower_server_shows_in_every_quantile_by_as_much_as_it_is_slower() -> None:
    slower = compare(result_of(1.0), result_of(1.3))
    assert [change.what for change in slower] == ["p50", "p90", "p99", "p99.9"]
    for change in slower[:3]:
        assert change.shown
        assert change.low < 1.3 < change.high


@pytest.mark.parametrize("truth", [0, 1, 2, 5, 23, 63, 64])
def test_the_search_finds_the_most_robots(truth: int) -> None:
    tried = []

    def holds(robots: int) -> bool:
        tried.append(robots)
        return robots <= truth

    found = find_capacity(holds, 64)
    assert found.robots == truth
    assert found.bounded == (truth < 64)
    assert len(tried) <= 20


def test_one_hiccup_does_not_decide_the_search() -> None:
    hiccups = {4}

    def holds(robots: int) -> bool:
        if robots in hiccups:
            hiccups.remove(robots)
            return False
        return robots <= 6

    assert find_capacity(holds, 64).robots == 6


def test_compare_has_an_exit_status_for_ci(tmp_path, capsys) -> None:
    save_result(tmp_path / "before.json", result_of(1.0))
    save_result(tmp_path / "after.json", result_of(1.5))
    words = [str(tmp_path / "before.json"), str(tmp_path / "after.json")]
    assert main(["compare", *words]) == 0
    assert main(["compare", *words, "--max-worse", "10%"]) == 1
    assert main(["compare", *reversed(words), "--max-worse", "10%"]) == 0
    assert main(["compare", str(tmp_path / "none.json"), words[1]]) == 2
    assert "slower" in capsys.readouterr().out


def test_a_key_does_not_come_into_results() -> None:
    command = command_line(["run", "http://robots.example", "--api-key=s3cret"], "s3cret")
    assert command.startswith("policy-bench run http://robots.example")
    assert "s3cret" not in command


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "line", "rect"):
            self.open.append(tag)
        if tag == "svg":
            self.pictures.append(dict(attrs)["aria-label"] or "")
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "line", "rect"):
            assert self.open.pop() == tag


def test_the_page_is_one_sound_file_that_loads_nothing_and_describes_its_plots() -> None:
    text = page(result_of(1.0))
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    assert parsed.loads == []
    assert len(parsed.pictures) == 4
    assert all(parsed.pictures)
    assert "prefers-color-scheme: dark" in text
    assert "nan" not in text


def test_what_a_server_says_of_itself_cannot_bring_code_into_the_page() -> None:
    result = result_of(1.0)
    object.__setattr__(result.test, "policy", "<script>alert(1)</script>")
    assert "<script" not in page(result)
