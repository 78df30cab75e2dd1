"""Groups of results as `results.collect` returns them, written by hand, for tests of tables."""

JUDGES = ("one", "two")
PASSES = {"encoder_forward": 3, "encoder_backward": 2, "denoiser_forward": 30, "denoiser_backward": 20}


def cell(arm, image, success, prompt="original", psnr=None, **rest):
    """An edit that both judges call thwarted (True), both obeyed (False), or they disagree on (None)."""
    said = {True: ([True, False, "ok"], [False, True, "ok"]), False: ([False, False, "ok"],) * 2,
            None: ([True, True, "ok"], [False, False, "ok"])}[success]
    method = None if arm == "control" else arm
    metrics = {} if psnr is None else {"psnr": psnr, "ssim": 0.5, "vifp": 0.25, "fsim": 0.75}
    return {"target": "miniature", "source": "miniature", "arm": arm, "attack": None, "method": method, "category": "portrait",
            "image_id": image, "prompt_id": prompt, "prompt_type": prompt.partition("-")[0], "seed": 1,
            "prompt": "do <it> & go", "metrics": metrics, "absent": {}, "damage": None, "failed": None,
            "judges": dict(zip(JUDGES, said, strict=True)), "original": "a", "immunized": "b",
            "edited_original": "c", "edited": "d", "verdict": "v", **rest}


def arm(name):
    row = {"seconds": 2.0, "passes": PASSES, "linf_steps": 7, "psnr": 34.0}
    return {"name": name, "method": None if name == "control" else name, "source": "miniature", "target": "miniature",
            "attack": None, "settings": {} if name in ("control", "noise") else {"steps": 100}, "options": {},
            "immunized": {} if name == "control" else {"x": row, "y": {**row, "seconds": 4.0}, "z": {**row, "seconds": 3.0}}}


def group(cells, suite="white-box", **rest):
    names = list(dict.fromkeys(one["arm"] for one in cells))
    editor = {"identity": {"weights": {"unet/w": "ab" * 32}, "scheduler": "DDIM", "dtype": "float32",
                           "defaults": {"steps": 10}}, "kind": "instruct", "notice": "Only for learning."}
    plan = {"suite": suite, "version": "0.1.0", "editors": {"miniature": editor}, "seed": 0, "eps": 0.03, "edit": {},
            "judge": {"kind": "oracle"}, "lpips": {"reason": "no weights"}, **rest}
    return {"plan": plan, "cells": cells, "missing": 0, "arms": [arm(name) for name in names],
            "pictures": {one["image_id"]: one["category"] for one in cells}}
