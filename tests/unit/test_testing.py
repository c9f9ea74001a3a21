"""./scripts/test counts honestly: what did not run, was skipped or is missing is a failure."""

from __future__ import annotations

import pytest

import judged
from kit import testing
from kit.testing import Outcome, Run, changed_hosts, junit, recap, summary

STEPS = ["destroy", "converge", "destroy"]


def line(steps: list[str] = STEPS, **counts: int) -> str:
    # Molecule counts the step that runs twice once among the successful ones.
    numbers = {"actions": 3, "successful": 2, "disabled": 0, "skipped": 0, "missing": 0, "failed": 0} | counts
    done = "".join(f"INFO     [default > {step}] Executed: Successful\n" for step in steps)
    recap_line = "default                   : " + "  ".join(f"{name}={number}" for name, number in numbers.items())
    return f"{done}{recap_line}\n"


def test_recap_counts_each_step():
    assert recap(line(), "default", STEPS) == Outcome(passed=3)


@pytest.mark.parametrize("counts", [{"missing": 1}, {"skipped": 1}, {"disabled": 1}, {"failed": 1}, {"actions": 2}])
def test_recap_with_less_than_all_steps_fails(counts):
    assert recap(line(**counts), "default", STEPS).failed == 1


@pytest.mark.parametrize("steps", [[], STEPS[:2], [*STEPS, "verify"], ["destroy", "destroy", "converge"]])
def test_recap_wants_each_step_in_its_place(steps):
    assert recap(line(steps), "default", STEPS).failed == 1


def test_scenario_that_stopped_is_a_failure():
    output = "INFO     [default > create] Executing\nINFO     [default > converge] Executing\nERROR\n"
    outcome = recap(output, "default", STEPS)
    assert (outcome.passed, outcome.failed) == (1, 1)
    assert "converge" in outcome.problems[0]
    assert recap("", "default", STEPS).failed == 1
    assert recap(line(), "other", STEPS).failed == 1


def report(tmp_path, cases: str):
    file = tmp_path / "report.xml"
    file.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return file


def test_junit_counts(tmp_path):
    outcome = junit(report(tmp_path, """
        <testcase classname="a" name="good"/>
        <testcase classname="a" name="bad"><failure message="assert 1 == 2">text</failure></testcase>
        <testcase classname="a" name="broken"><error message="no fixture">text</error></testcase>
        <testcase classname="a" name="left out"><skipped message="not today"/></testcase>
        <testcase classname="a" name="known"><skipped message="no IPv6 in this lab"/></testcase>"""))
    assert (outcome.passed, outcome.failed) == (2, 3)
    assert any("not today" in problem for problem in outcome.problems)


def test_a_failed_test_tells_its_error_and_its_place(tmp_path):
    text = "\n".join(["&gt; assert one", "E   AssertionError: of two words", "E   assert one", "", "tests/x.py:7: "])
    outcome = junit(report(tmp_path, f'<testcase name="bad"><failure message="m">{text}</failure></testcase>'))
    assert outcome.problems == ["bad: tests/x.py:7\n    AssertionError: of two words\n    assert one"]
    outcome = junit(report(tmp_path, '<testcase name="bad"><error message="no fixture">text</error></testcase>'))
    assert outcome.problems == ["bad: no fixture"]


def test_nothing_collected_is_a_failure(tmp_path):
    assert junit(report(tmp_path, "")).failed == 1
    assert junit(tmp_path / "never-written.xml").failed == 1


def test_changed_hosts_sums_all_recaps():
    one = "PLAY RECAP ***\nnode1  : ok=4 changed=1 unreachable=0\nnode2 : ok=4    changed=0    unreachable=0\n"
    assert changed_hosts(one + one) == ({"node1": 2, "node2": 0}, 2)
    assert changed_hosts("nothing") == ({}, 0)


def test_summary_ends_with_the_sum():
    text, good = summary([("a", Outcome(2, 0), 60.0), ("b", Outcome(3, 0), 1.0)])
    assert text.splitlines()[-1] == "5 passed, 0 failed"
    assert good
    text, good = summary([("a", Outcome(2, 1, ["x"]), 60.0)])
    assert text.splitlines()[0] == "FAILED a: x", "each failure once more, since the end of a log is what is kept"
    assert text.splitlines()[-1] == "2 passed, 1 failed"
    assert not good


def test_a_part_that_checked_nothing_is_a_failure():
    text, good = summary([("a", Outcome(1, 0), 1.0), ("b", Outcome(), 1.0)])
    assert text.splitlines()[-1] == "1 passed, 1 failed"
    assert not good
    assert not summary([])[1]


def test_a_broken_part_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(testing, "LOGS", tmp_path)

    def part(_console, _run):
        raise OSError("disk gone")

    _, outcome, _ = testing.run_part("x", part, testing.Run("short", "0"), 0.0)
    assert outcome.failed == 1
    assert "disk gone" in outcome.problems[0]


def test_a_failing_program_without_a_failing_test_is_a_failure():
    assert testing.with_exit_code(Outcome(passed=4), "pytest failed").failed == 1
    assert testing.with_exit_code(Outcome(passed=4), None).failed == 0


def test_command_line(capsys):
    parts, run, _ = testing.parse([])
    assert list(parts)[-7:] == ["lab", "default", "debian12", "backends", "bare", "faults", "storages"]
    assert {"node_loss", "corruption", "database_loss"} <= {*run.only} and "replacement" not in run.only
    assert {*testing.FILES_WHEN_NAMED} <= {*testing.files()}
    for name in testing.WHEN_NAMED:
        assert list(testing.parse([name])[0]) == [name], "it is there when it is named"
    assert testing.parse(["faults"])[1].only == testing.parse(["long"])[1].only == (), "all of them"
    assert testing.parse(["replacement"])[1].only == ("replacement",)
    assert run.set == "short"
    parts, run, _ = testing.parse(["long", "bare"])
    assert (list(parts), run.set) == (["bare"], "long")
    assert "lab" not in testing.parse(["quick"])[0]
    assert testing.parse(["list"])[2]
    with pytest.raises(SystemExit):
        testing.parse(["nonsense"])
    assert "no part is named nonsense" in capsys.readouterr().err


def test_media_back_ends_are_chosen_by_the_seed_and_all_tried_by_the_long_set(monkeypatch):
    monkeypatch.delenv("LAB_BACKEND", raising=False)
    assert testing.variants("default", Run("long", "0")) == [Run("long", "0")]

    def chosen(run):
        return [one.env["LAB_BACKEND"] for one in testing.variants("backends", run)]

    assert chosen(Run("long", "0")) == ["hybrid", "async", "distributed"]
    assert {tuple(chosen(Run("short", str(seed)))) for seed in range(30)} == {("hybrid",), ("async",), ("distributed",)}
    assert chosen(Run("short", "7")) == chosen(Run("short", "7"))
    monkeypatch.setenv("LAB_BACKEND", "async")
    assert chosen(Run("long", "0")) == ["async"]


def test_every_shell_script_is_found():
    found = testing.shell_scripts()
    assert {"scripts/test", "scripts/lab", ".ci/run", "molecule/shared/vault-password"} <= set(found)


def test_packages_that_are_missing_are_named(monkeypatch):
    assert testing.missing_packages() == []  # or these tests would not have begun
    packages = {"one": ("no/*", ""), "two": ("no", "sh"), "three": ("usr/b*n/env", ""), "four": ("no", "no-such")}
    monkeypatch.setattr(testing, "UNIT_PACKAGES", packages)
    assert testing.missing_packages() == ["one", "four"]


def test_words_for_files_of_a_scenario():
    words = testing.files()
    assert {"node_loss", "quorum_loss", "planted"} <= {word for word, name in words.items() if name == "faults"}
    assert {word for word, name in words.items() if name == "outage"} == {"outage", "fallback", "backup"}
    assert not words.keys() & set(testing.scenarios()) - {"outage"}, "a word means one thing"
    parts, run, _ = testing.parse(["long", "node_loss", "partition"])
    assert list(parts) == ["faults"] and run.only == ("node_loss", "partition") and run.set == "long"
    assert run.env["TRIBRICK_ONLY"] == "node_loss partition"
    parts, run, _ = testing.parse(["faults"])
    assert list(parts) == ["faults"] and run.only == ()
    parts, run, _ = testing.parse(["backup"])
    assert list(parts) == ["outage"] and run.only == ("backup",)
    parts, run, _ = testing.parse(["outage"])
    assert list(parts) == ["outage"] and run.only == ("outage",)
    parts, run, _ = testing.parse(["outage", "backup"])
    assert list(parts) == ["outage"] and run.only == ("outage", "backup"), "both in one lab"


class Item:
    def __init__(self, path: str) -> None:
        self.path = path


def test_files_that_were_asked_for_are_kept(monkeypatch):
    def kept(only: list[str], *paths: str) -> list[str]:
        monkeypatch.setattr(judged, "ONLY", only)
        return [str(item.path) for item in judged.asked([Item(path) for path in paths])]

    assert kept([], "a/test_10_outage.py", "a/test_20_backup.py") == ["a/test_10_outage.py", "a/test_20_backup.py"]
    assert kept(["backup"], "a/test_10_outage.py", "a/test_20_backup.py") == ["a/test_20_backup.py"]
    assert kept(["backup"], "a/test_10_node_loss.py") == ["a/test_10_node_loss.py"], "asked for of another scenario"
