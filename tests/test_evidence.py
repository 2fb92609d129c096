"""benchmarks.evidence: which runs there are, that none is made twice, and the tables of rows."""

import csv
import shlex
from statistics import mean

import pytest
from PIL import Image
from scipy import stats

import train
from benchmarks import evidence, evidence_tables


@pytest.fixture
def trained(here, monkeypatch):
    """Runs that end at once, with made-up numbers; gives the keys that were trained."""
    keys = []

    def measure(settings, root, finished, environment):
        key, job = finished
        keys.append(key)
        number = len(keys) % 7 + 10 * ("+" in key[2] or "all" in key[2]) + 5 * int(key[3])
        return dict(zip(evidence.KEY, key)) | {
            "seconds": 100, "curve R@1": f"1.00 {number}", "last R@1": number,
            "last MAP@R": number / 2, "std": 0.007,
            "chosen val/MAP@R": 7919 * len(keys) % 10007, "chosen R@1": number,
            "chosen MAP@R": number, "retrieval training R@1": 90, "retrieval unseen R@1": number,
            "retrieval unseen effective rank": 40 + number,
        }  # fmt: skip

    monkeypatch.setattr(evidence, "measure", measure)
    monkeypatch.setattr(evidence, "prepare", lambda *_: None)
    monkeypatch.setattr(evidence, "state_of", lambda _: "done")
    monkeypatch.setattr(evidence.sweep, "complete", lambda *_: [])
    return keys


def command(suite, *more):
    return evidence.main([suite, "--table", "evidence.csv", *more])


@pytest.mark.parametrize("suite, count", [("ablation", 110), ("losses", 72), ("weights", 64)])
def test_every_run_of_a_suite_is_trained_once_and_what_has_its_row_never_again(
    trained, here, suite, count
):
    assert command(suite) == 0
    assert len(trained) == len(set(trained)) == count
    assert [int(key[3]) for key in trained] == sorted(int(key[3]) for key in trained)
    with open("evidence.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    kept = [row for row in rows if row["seed"] == "1" or row["start"] == "random"]
    with open("evidence.csv", "w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(kept)
    trained.clear()
    assert command(suite) == 0
    assert len(trained) == count - len(kept)
    assert command(suite) == 0 and len(trained) == count - len(kept)


@pytest.mark.parametrize("scale", [evidence.HERE, evidence.LONG])
@pytest.mark.parametrize("suite", evidence.SUITES)
def test_settings_are_flags_of_train_py_and_no_two_are_the_same(suite, scale):
    parser = train.build_parser()
    settings = evidence.settings_of(suite, scale)
    parsed = [vars(parser.parse_args(shlex.split(flags))) for flags in settings.values()]
    assert len({str(flags) for flags in parsed}) == len(settings)
    both = [name.startswith("all") for _, name in settings]
    assert suite != "weights" or 2 * sum(both) == len(both)  # as many trials for the plain loss


def test_the_cost_is_said_before_anything_is_trained(trained, capsys):
    assert command("ablation", "--dry-run") == 0 and not trained
    assert "ablation: 110 runs, 2 at a time, about" in capsys.readouterr().out


def test_weights_repeats_what_held_out_classes_chose_with_seeds_that_did_not_choose(trained):
    command("weights")
    repeated = [key for key in trained if key[3] != "1"]
    assert sorted({key[3] for key in repeated}) == ["2", "3", "4"] and len(repeated) == 12
    best = {}
    for row in evidence.read_table(evidence.Path("evidence.csv")).values():
        if row["seed"] == "1":
            group = row["start"], row["setting"].split(",")[0]
            trial = float(row["chosen val/MAP@R"]), row["setting"]
            best[group] = max(best.get(group, (0,)), trial)
    assert {key[1:3] for key in repeated} == {(s, name) for (s, _), (_, name) in best.items()}


def test_tables_are_made_of_the_rows_with_paired_differences(trained, here):
    for suite in evidence.SUITES:
        command(suite)
    places = [f"<!-- {suite} {start} -->\nold\n<!-- end -->\n"
              for suite in evidence.SUITES for start in evidence.STARTS]  # fmt: skip
    (here / "evidence.md").write_text("# Title\n" + "text\n".join(places) + "the end\n")
    evidence_tables.write(here)
    text = (here / "evidence.md").read_text()
    assert "old" not in text and text.startswith("# Title\n<!-- ablation random -->\n| setting")
    assert text.endswith("<!-- end -->\nthe end\n") and text.count("text\n") == 5
    settings = evidence_tables.read(here / "evidence.csv")["ablation", "random"]
    ours, theirs = ([settings[name][seed]["last R@1"] for seed in range(1, 6)]
                    for name in ("all", "Proxy-Anchor"))  # fmt: skip
    interval = stats.ttest_rel(ours, theirs).confidence_interval()
    half = (interval.high - interval.low) / 2
    difference = mean(ours) - mean(theirs)
    assert f"{difference:+.2f} ± {half:.2f}" + " ↑" * bool(difference > half) in text
    assert Image.open(here / "evidence.png").width > 1000
    before = text
    evidence_tables.write(here)
    assert (here / "evidence.md").read_text() == before
