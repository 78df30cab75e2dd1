"""The options around any method: defaults, flags, refusals, reports and the plan of an experiment."""

import argparse
import json
from pathlib import Path

import pytest
from photographs import photo, smooth

import sifm_min
from sifm_min import cli, immunize
from sifm_min.experiments import estimate, plan
from sifm_min.immunizing import flags
from sifm_min.objectives.around import Around, choose

PROMPT = "make it night"
FLAT, REFINED = {"share": 0.05, "weight": 0.3}, {"every": 10, "rounds": 5, "reach": 0.1}


@pytest.mark.parametrize("name, given, expected", [
    ("sifm", {}, Around()), ("tdae", {}, Around(FLAT, REFINED)), ("tdae", {"flat": False}, Around(None, REFINED)),
    ("mist", {"flat": True, "blur": 2}, Around(FLAT, None, 2)),
    ("mine:away", {"flat": {"weight": 1}}, Around(FLAT | {"weight": 1})),
    ("sifm", {"refine_text": {"every": 3}}, Around(None, REFINED | {"every": 3})), ("noise", {"blur": 1.0}, Around(blur=1.0)),
], ids=str)
def test_defaults_are_the_methods(name, given, expected):
    assert choose(name, **given) == expected


@pytest.mark.parametrize("name, given, says", [
    ("sds", {"flat": True}, "flat compares the losses of two places, and the loss that sds reports is not the function whose"),
    ("noise", {"flat": True}, "noise has no loss that could be flat: leave flat out"),
    ("mist", {"refine_text": True}, "refine_text is for sifm, sifm-output, semantic-attack, tdae, not for mist: it moves"),
    ("latent", {"refine_text": True}, "refine_text is for sifm, sifm-output, semantic-attack, tdae, not for latent"),
    ("sifm", {"blur": 0.1}, "blur 0.1: a standard deviation from 0.3 to 16 pixels"),
    ("sifm", {"blur": 30.0}, "blur 30: a standard deviation from"),
    ("sifm", {"flat": {"radius": 1}}, "flat has no radius; it has share, weight"),
    ("sifm", {"flat": {"share": 0}}, "flat: share is 0; it is a number above 0, such as 0.05"),
    ("sifm", {"refine_text": {"rounds": 1.5}}, "refine_text: rounds is 1.5; it is a whole number above 0, such as 5"),
])
def test_refusals_are_one_sentence_before_any_work(name, given, says, tiny, monkeypatch):
    monkeypatch.setattr(type(tiny), "context", lambda self, prompts: pytest.fail("text was encoded"))
    with pytest.raises(ValueError, match=says) as caught:
        sifm_min.immunize(smooth(28, 22), tiny, PROMPT, method=name, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argv, expected", [
    ([], {"flat": None, "refine_text": None, "blur": None}),
    (["--flat", "--blur", "1.5"], {"flat": True, "refine_text": None, "blur": 1.5}),
    (["--no-flat", "--refine-text"], {"flat": False, "refine_text": True, "blur": None}),
    (["--flat-share", "0.1", "--refine-every", "4", "--refine-reach", "1/5"],
     {"flat": {"share": 0.1}, "refine_text": {"every": 4, "reach": 0.2}, "blur": None}),
    (["--flat", "--flat-weight", "1"], {"flat": {"weight": 1.0}, "refine_text": None, "blur": None}),
])
def test_flags_are_the_librarys_arguments(argv, expected):
    assert flags.around(flags.parser().parse_args(argv)) == expected


@pytest.mark.parametrize("argv, says", [
    (["--no-flat", "--flat-share", "0.1"], "--no-flat and --flat-share contradict each other; give one of them"),
    (["--no-refine-text", "--refine-rounds", "2"], "--no-refine-text and --refine-rounds contradict each other"),
    (["--method", "sds", "--flat"], "the loss that sds reports is not the function whose gradient it follows"),
    (["--method", "mist", "--refine-text"], "not for mist"),
    (["--blur", "99"], "blur 99: a standard deviation from"),
])
def test_wrong_flags_end_in_usage_and_touch_nothing(argv, says, loaded_once, capsys):
    photo("a.png")
    assert immunize.main(["a.png", "--prompt", PROMPT, "--editor", "tiny", "-o", "out", *argv]) == cli.USAGE
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1 and not Path("out").exists()


def test_command_reports_them_and_another_number_is_another_run(loaded_once, capsys):
    photo("a.png")
    argv = ["a.png", "--prompt", PROMPT, "--editor", "tiny", "--steps", "2", "--timesteps", "1", "--no-preview", "-o", "out",
            "--refine-text", "--refine-rounds", "2", "--blur", "1"]
    assert immunize.main([*argv, "--flat-share", "0.1"]) == cli.OK
    report = json.loads(Path("out/a.json").read_text())
    assert {name: report["options"][name] for name in ("flat", "refine_text", "blur")} == {
        "flat": {"share": 0.1, "weight": 0.3}, "refine_text": {"every": 10, "rounds": 2, "reach": 0.1}, "blur": 1.0}
    assert report["gradient_evaluations"] == 2 * 2 + 2 and report["passes"]["encoder_backward"] == 4
    assert immunize.main([*argv, "--flat-share", "0.2"]) == cli.SOME_FAILED


def test_a_name_of_the_commands_own_is_no_option_of_a_method():
    with pytest.raises(ValueError, match="sifm has no option flat; --flat is of the command itself"):
        sifm_min.methods.parse("sifm", ["flat=true"])


# --------------------------------------------------------------------------------------------------------------- experiments

def test_plan_gives_each_method_what_it_can_have():
    given = {"flat": True, "refine_text": True, "blur": 1.0}
    arms = [plan.make_arm(name, name, source="tiny", target="tiny") for name in ("sifm", "mist", "sds", "noise", "danp")]
    arms.append(plan.make_arm("control", source="tiny", target="tiny"))
    made = plan.make_plan("white-box", {}, [], arms, seeds=[1], options=given)
    found = {arm["name"]: {name: arm["settings"][name] for name in given if name in arm["settings"]} for arm in made["arms"]}
    assert found == {"sifm": given, "mist": {"flat": True, "blur": 1.0}, "sds": {"blur": 1.0}, "noise": {"blur": 1.0},
                     "danp": {"flat": True, "blur": 1.0}, "control": {}}


def test_estimate_counts_every_refinement(monkeypatch):
    """A set-up of 7 s, steps of 1 s, each 10th of a text with five more gradients, of 0.5 s in a flat run."""
    now = [0.0]
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])

    def work(on_step):
        now[0] += 7
        for step in range(STEPS):
            now[0] += 3.5 if step // texts % 10 == 0 else 1.0
            taken.append(step)
            on_step(step, 0.0, {})

    for STEPS, texts in ((30, 1), (100, 5), (4, 5), (1, 1)):
        taken = []
        around = choose("tdae")
        found = estimate.timed(work, STEPS, *estimate.refinements(around, texts, STEPS))
        refined = sum(step // texts % 10 == 0 for step in range(STEPS))
        assert found == pytest.approx(7 + STEPS + 2.5 * refined) and len(taken) <= texts + 2
    assert estimate.refinements(choose("sifm"), 5, 100) == (0, 0.0)
    assert estimate.refinements(choose("sifm", refine_text={"every": 4}), 1, 30) == (1, 7 * 5)


def test_evaluate_says_which_methods_go_without(monkeypatch, capsys):
    from sifm_min import evaluate
    args = argparse.Namespace(flat=True, refine_text=True, blur=None, quiet=False)
    assert evaluate._around(args, ["mist", "sds", "sifm"]) == {"flat": True, "refine_text": True}
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and sum("sds is run without it" in line for line in told) == 2 and "mist" in "".join(told)
    with pytest.raises(ValueError, match="blur 99"):
        evaluate._around(argparse.Namespace(flat=False, refine_text=False, blur=99.0, quiet=False), ["sifm"])
