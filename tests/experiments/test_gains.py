"""Arms with a changed protection: several editors, several prompts, purifiers; and the table that says what each gains."""

import dataclasses
import json
from pathlib import Path

import pytest
from results_by_hand import PASSES, cell, group
from test_evaluate import calls, loaded, run, table  # noqa: F401 (fixtures)

from sifm_min import cli, evaluate
from sifm_min.editors.latents import load_latents
from sifm_min.experiments import charts, comparison, gains, plan, results, runner, suites, tables
from sifm_min.judging.paired import mcnemar
from sifm_min.miniature.kinds import KINDS


def by_hand(names, successes, **rest):
    """A group in which each arm thwarts so many of ten pictures, the first ones."""
    cells = [cell(name, f"p{i}", i < count) for name, count in zip(names, successes, strict=True) for i in range(10)]
    made = group(cells, **rest)
    for one in made["arms"]:
        if one["name"].endswith("(both)"):
            one["immunized"] = {"x": {"seconds": 8.0, "passes": {part: 2 * n for part, n in PASSES.items()}, "linf_steps": 7,
                                      "psnr": 34.0}}
    return made


@pytest.fixture
def transfer():
    """The control fails 1 edit of 10, the transfer arm 3, the joint one 9, the white box 10."""
    return by_hand(["control", "sifm", "sifm (white box)", "sifm (both)"], [1, 3, 10, 9], suite="white-box")


def test_gains_are_paired_corrected_and_have_their_cost(transfer):
    made = {one.title.rpartition(": ")[2]: one for one in tables.tables(transfer)}
    found = {row["method"]: row for row in made["what each gains"].data}
    assert set(found) == {"sifm (white box)", "sifm (both)"}
    both, white = found["sifm (both)"], found["sifm (white box)"]
    assert (both["over"], both["gain"], both["isr"], both["isr_without"]) == ("sifm", pytest.approx(0.6), 0.9, 0.3)
    p = {"both": mcnemar(6, 0), "white": mcnemar(7, 0)}
    assert (both["p"], white["p"]) == (p["both"], p["white"])
    assert (both["p_holm"], white["p_holm"]) == (max(p["both"], 2 * p["white"]), 2 * p["white"])        # Holm's, of two
    assert both["of_white_box"] == pytest.approx(8 / 9) and white["of_white_box"] == 1
    assert (both["seconds"], both["seconds_without"]) == (8.0, 3.0)
    assert (both["denoiser_backward"], both["denoiser_backward_without"]) == (40, 20)
    rows = {row[0]: row for row in made["what each gains"].rows}
    assert rows["SIFM (both)"][2:4] == ["10", "90% [60, 98]"] and rows["SIFM (both)"][7] == "89%"
    assert rows["SIFM (both)"][-4:] == ["6 + 4", "3 + 2", "60 + 40", "30 + 20"]


def test_page_draws_the_gains(transfer):
    drawn = [text for text in charts.charts([transfer]) if "What each gains in ISR" in text]
    assert len(drawn) == 1 and "SIFM (both), SIFM (both): 60%" not in drawn[0]
    assert "Original prompt, SIFM (both): 60% [" in drawn[0] and ">-100%<" in drawn[0] and ">100%<" in drawn[0]


def test_no_gains_without_a_plain_arm_or_a_verdict(transfer):
    for made in (by_hand(["control", "sifm (both)"], [1, 9]), by_hand(["control", "sifm"], [1, 9])):
        assert not any("each gains" in one.title for one in tables.tables(made))
    for one in transfer["cells"]:
        one["judges"] = None
    assert not any("each gains" in one.title for one in tables.tables(transfer))


@pytest.mark.parametrize(("name", "base"), [
    ("sifm (both)", "sifm"), ("sifm (robust), jpeg-50", "sifm, jpeg-50"), ("sifm", None), ("sifm, jpeg-50", None),
    ("lambda 0.1", None), ("sifm, odd (attack)", None)])
def test_base_of_an_arm(name, base):
    assert gains.base_of(name) == base


def test_comparison_with_sifm_is_as_before(transfer):
    paired = comparison.against_sifm(transfer["cells"], ("one", "two"), [arm["name"] for arm in transfer["arms"]])
    assert paired["sifm", "original"].note == comparison.REFERENCE and paired["control", "original"].comparisons == 3


# -- arms --------------------------------------------------------------------------------------------------------------

def test_transfer_arms_protect_one_and_both(loaded):  # noqa: F811
    first, second = (dataclasses.make_dataclass("E", ["kind"])(kind) for kind in ("instruct", "img2img"))
    encoders = dataclasses.make_dataclass("E", ["kind"])("encoders")
    arms, _ = suites.arms("transfer", {"a": first, "b": second, "latents": encoders}, ("sifm",))
    found = {(arm["target"], arm["name"]): plan.sources_of(arm) for arm in arms if arm["method"] == "sifm"}
    assert found == {("b", "sifm"): ["a"], ("b", "sifm (white box)"): ["b"], ("b", "sifm (both)"): ["a", "b"],
                     ("b", "sifm (both + latents)"): ["a", "b", "latents"], ("a", "sifm"): ["b"],
                     ("a", "sifm (white box)"): ["a"], ("a", "sifm (both)"): ["a", "b"],
                     ("a", "sifm (both + latents)"): ["a", "b", "latents"]}
    single = next(arm for arm in arms if arm["name"] == "sifm")
    assert set(single) == {"name", "method", "source", "target", "options", "attack"}        # as older folders have it


def test_joint_arm_is_asked_in_the_words_of_each_editor():
    texts = {"id": "original", "type": "original", "instruct": "make it night", "img2img": "a night"}
    case = {"id": "p", "category": "landscape", "sha256": "0" * 64, "prompts": [texts]}
    kinds = {"a": "instruct", "b": "img2img", "latents": "encoders"}
    planned = {"editors": {name: {"kind": kind, "identity": name} for name, kind in kinds.items()}, "seed": 0, "eps": 0.03,
               "version": "1"}
    arm = {**plan.make_arm("sifm (both)", "sifm", source=[*kinds], target="a"), "settings": {}}
    assert runner.asked_of(planned, kinds, case, arm) == (
        [*kinds.values()], [], {"each": [{"prompts": ["make it night"]}, {"prompts": ["a night"]}, {"prompts": []}]})
    single = {**plan.make_arm("sifm", "sifm", source="b", target="a"), "settings": {}}
    assert runner.asked_of(planned, kinds, case, single) == ("img2img", ["a night"], {})
    assert len({plan.immunize_key(planned, case, one) for one in (arm, single)}) == 2
    before = plan.step_key(planned, "immunize", picture="0" * 64, method="sifm", eps=0.03, seed=0, settings={}, editor="b",
                           prompt="a night")
    assert plan.immunize_key(planned, case, single) == before            # older folders are found again


def test_robust_arms_stand_beside_plain_ones():
    editor = dataclasses.make_dataclass("E", ["kind", "name"])("instruct", "a")
    plain, _ = suites.arms("robustness", {"a": editor}, ("sifm",), robust=True)
    both, _ = suites.arms("robustness", {"a": editor}, ("sifm",))
    assert "sifm (robust)" not in {arm["name"] for arm in plain} and len(both) > len(plain)
    (arm,) = (arm for arm in both if arm["name"] == "sifm (robust), jpeg-50")
    assert plan._settings(arm, {}, "protocol")["robust"] is True and plan.work_of(arm) == "sifm, robust"


# -- end to end on tiny editors ----------------------------------------------------------------------------------------

@pytest.fixture
def asked(monkeypatch, run):  # noqa: F811
    """What each immunization of a run is given: {method and options} with the report it gives."""
    made, immunize = [], runner.immunize

    def immunizing(image, editor, prompts, **options):
        result = immunize(image, editor, prompts, **options)
        made.append((editor, prompts, options, result.report))
        return result
    monkeypatch.setattr(runner, "immunize", immunizing)
    return made


@pytest.mark.slow
def test_transfer_runs_joint_arms_with_latents(run, loaded, tiny_folder, asked, capsys):  # noqa: F811
    loaded["latents"] = load_latents(f"latents:{tiny_folder}", device="cpu")
    try:
        second = list(loaded)[1]
        assert run("transfer", "--other", second, "--images", "1") == cli.OK
        joint = [(editor, options, report) for editor, _, options, report in asked if isinstance(editor, list)]
        assert [len(editor) for editor, _, _ in joint] == [2, 3]
        assert [one["called"] for one in joint[1][2]["editors"]] == [*(Path(name).name for name in list(loaded)[:2]), "latents"]
        (found,) = results.collect("out")
        assert {cell["arm"] for cell in found["cells"]} == {
            "control", "noise", *(f"photoguard-encoder{more}" for more in ("", " (white box)", " (both)", " (both + latents)"))}
        assert found["missing"] == 0 and not any(cell["failed"] for cell in found["cells"])
        assert "PhotoGE (both + latents)" in table(capsys) and "what each gains" in table(capsys)
        asked.clear()
        assert run("transfer", "--other", second, "--images", "1") == cli.OK and not asked
        assert evaluate.main(["report", "out", "--quiet"]) == cli.OK
        assert "What each gains in ISR, transfer" in Path("out/report.html").read_text()
    finally:
        del loaded["latents"]


@pytest.mark.slow
def test_unseen_compares_one_five_and_any_prompt(run, asked, tmp_path, capsys):  # noqa: F811
    assert run("unseen", "--images", "1", "--methods", "sds") == cli.OK
    (file,) = Path("out/plans").glob("*.json")
    planned = json.loads(file.read_text())
    (case,) = planned["cases"]
    edited = {prompt["instruct"] for prompt in case["prompts"]}
    one, five, drawn = [(prompts, options.get("any_prompt")) for _, prompts, options, _ in asked if options["method"] == "sds"]
    assert one == ([case["prompts"][0]["instruct"]], None) == (five[0][:1], five[1]) and len(set(five[0])) == 5
    edited |= {phrase for kind, option in case["edits"] for phrase in KINDS[kind].phrases(option)}
    assert not set(five[0][1:]) & edited                     # what is unseen stays unseen, in other words too
    texts = set(drawn[1].texts("instruct"))
    everything = suites.bank(world=True).texts("instruct")
    assert drawn[0] == one[0] and len(texts) == len(everything) - 6 and not texts & edited and set(five[0][1:]) < texts
    assert planned["bank"]["name"] == "miniature" and "Unseen prompts" in (told := table(capsys))
    assert "SDS(-) (any prompt)" in told or "(any prompt)" in told
    bank = tmp_path / "bank.txt"
    bank.write_text("\n".join(f"instruction {number}" for number in range(9)))
    asked.clear()
    assert run("unseen", "--images", "1", "--methods", "sds", "--any-prompt", str(bank)) == cli.OK
    assert len(asked) == 2 and asked[0][1][1:] == [f"instruction {number}" for number in range(4)]     # five and any are new
    assert run("white-box", "--any-prompt", str(bank)) == cli.USAGE
