"""The benchmark: its questions, what its figures say of right, wrong and deceitful images, and a whole small run."""

import dataclasses
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from tiny_pipeline import write_tiny_pipeline

from mini_scenes import BACKGROUNDS, TEXTURES, Scene, accent_of, render_scene
from mini_scenes.judge import Judge, Seen, parse_caption
from runtime_jax.config import build, load
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.training.stop import StoppedError
from tokenverse_jax.bench.appearance import Appearance, light_likeness, object_likeness
from tokenverse_jax.bench.cases import Case, make_cases, make_images, read_images
from tokenverse_jax.bench.metrics import View, measure
from tokenverse_jax.bench.rows import FULL, PROMPT, RENDERED, make_rows
from tokenverse_jax.bench.run import Bench, BenchConfig, bench
from tokenverse_jax.bench.table import complete, markdown, summarize
from tokenverse_jax.concepts.concept_mod import ConceptModConfig
from tokenverse_jax.concepts.isolation import IsolationConfig
from tokenverse_jax.concepts.learn import LearnConfig, StageConfig
from tokenverse_jax.concepts.learner import Learner
from tokenverse_jax.flux.sampling import SamplingConfig

SIZE = 64
IMAGES = make_images(64, seed=0)
CASES = make_cases(IMAGES, seed=0)
TASKS = ("composition", "decomposition", "full", "single", "same word", "direction")


def of_task(task: str) -> list[Case]:
    return [case for case in CASES if case.task == task]


def perfect_sight(scene: Scene) -> View:
    """An image of a scene and what a judge without error sees in it."""
    image, mask = render_scene(scene, SIZE)
    masks = tuple(mask == i + 1 for i in range(len(scene.objects)))
    textures = tuple(np.eye(len(TEXTURES))[TEXTURES.index(item.texture)] for item in scene.objects)
    return View(image, Seen(scene, masks, textures))


def repainted(case: Case, *numbers: int) -> Scene:
    """The case's scene with other looks on some objects: the opposite colour, the next texture, upside down."""
    scene = case.scene
    for number in numbers:
        item = scene.objects[number]
        rgb = tuple(255 - channel for channel in item.rgb)
        texture = TEXTURES[(TEXTURES.index(item.texture) + 1) % len(TEXTURES)]
        turned = item.rotation + 180.0
        scene = scene.with_object(number, rgb=rgb, accent=accent_of(rgb), texture=texture, rotation=turned)
    return scene


# The questions.


def test_questions_are_a_pure_function_of_the_seed():
    assert make_images(64, seed=0) == IMAGES and make_cases(IMAGES, seed=0) == CASES
    assert make_images(64, seed=1) != IMAGES
    assert [image.scene for image in make_images(32, seed=0)[:16]] == [image.scene for image in IMAGES[:16]]


def test_every_task_has_its_cases():
    counts = {task: len(of_task(task)) for task in TASKS}
    assert counts["composition"] == 16 and counts["decomposition"] == 32 and counts["full"] == 32
    assert counts["single"] == 32 and counts["direction"] == 32 and counts["same word"] >= 20
    assert len({case.name for case in CASES}) == len(CASES)
    assert sum(use.object is None for case in of_task("composition") for use in case.uses) == 8


@pytest.mark.parametrize("count", [0, 2, 6])
def test_images_come_in_pairs_of_either_kind(count):
    with pytest.raises(ValueError, match="multiple of 4"):
        make_images(count, seed=0)


def test_captions_name_the_words_and_no_looks():
    for image in IMAGES:
        assert len(set(image.captions)) >= 3
        for caption in image.captions:
            wanted = parse_caption(caption)
            from_left = sorted(image.scene.objects, key=lambda item: item.x)
            assert [item.shape for item in wanted.objects] == [item.shape for item in from_left]
            assert wanted.background == image.scene.background.kind
            named = [getattr(item, kind) for item in wanted.objects for kind in ("color", "texture", "size", "pose")]
            assert {*named, wanted.warmth, wanted.direction} == {None}
            assert all(re.search(rf"\b{word}\b", caption) for word in image.words)


def test_prompts_ask_for_what_the_true_scene_has_and_name_no_looks_of_concepts():
    for case in CASES:
        wanted = parse_caption(case.prompt)
        assert [item.shape for item in wanted.objects] == [item.shape for item in case.scene.objects]
        uses = {use.object for use in case.uses}
        for number, (asked, item) in enumerate(zip(wanted.objects, case.scene.objects, strict=True)):
            is_named = case.task == "single" and number not in uses
            assert (asked.color, asked.texture) == ((item.color, item.texture) if is_named else (None, None))
            assert asked.size is asked.pose is None
        light = (case.scene.light.warmth_name, case.scene.light.direction_name)
        assert (wanted.warmth, wanted.direction) == (light if case.task == "single" else (None, None))
        for use in case.uses:
            phrase = use.target.split("#")[0]
            assert re.search(rf"\b{phrase}\b", case.prompt)
            if use.object is None:
                assert phrase == BACKGROUNDS[wanted.background]
            else:
                assert phrase.split()[-1] == wanted.objects[use.object].shape
            assert use.image is None or IMAGES[use.image].words[use.word] == use.look


def test_concepts_of_one_case_can_be_told_apart():
    for case in CASES:
        if case.task != "same word":
            assert len({item.shape for item in case.scene.objects}) == len(case.scene.objects)
            assert len({item.color for item in case.scene.objects}) == len(case.scene.objects)


def test_units_of_a_task_share_no_image():
    for task in TASKS[:5]:
        owner: dict[int, int] = {}
        for case in of_task(task):
            for use in case.uses:
                assert owner.setdefault(use.image, case.unit) == case.unit


# The figures, with a judge that makes no error.


def test_true_scenes_have_full_marks():
    for case in CASES:
        view = perfect_sight(case.scene)
        result = measure(case, view, view)
        assert (result.cp, result.pf, result.cp_pf) == (pytest.approx(1), 1, pytest.approx(1)), case
        assert result.locality is None and result.bleeding in (None, 0.0)


def test_other_looks_have_no_concept_preservation():
    for case in of_task("full"):
        view = perfect_sight(repainted(case, 0, 1))
        result = measure(case, view, view)
        assert result.cp < 0.3 and result.pf == 1


def test_swapped_looks_have_neither_preservation_nor_separation():
    """Each concept on the other's object: the failure that the paper's isolation loss is about."""
    for case in of_task("full"):
        first, second = case.scene.objects
        looks = [{name: getattr(item, name) for name in ("rgb", "accent", "texture")} for item in (first, second)]
        swapped = perfect_sight(case.scene.with_object(0, **looks[1]).with_object(1, **looks[0]))
        plain = perfect_sight(repainted(case, 0, 1))
        result = measure(case, swapped, plain)
        assert result.cp < 0.85 and result.bleeding > 0.1


def test_a_copy_of_the_concept_image_does_not_follow_the_prompt():
    for case in of_task("single"):
        source = IMAGES[case.uses[0].image].scene
        view = perfect_sight(source)
        result = measure(case, view, perfect_sight(case.scene))
        assert result.cp == pytest.approx(1) and result.pf <= 0.6


def test_a_missing_object_counts_nothing():
    case = of_task("full")[0]
    view = perfect_sight(dataclasses.replace(case.scene, objects=()))
    result = measure(case, view, perfect_sight(case.scene))
    assert result.cp == 0 and result.pf < 0.5 and result.bleeding is None


def test_a_change_of_the_target_alone_is_local_and_does_not_bleed():
    for case in of_task("single"):
        (use,) = case.uses
        result = measure(case, perfect_sight(case.scene), perfect_sight(repainted(case, use.object)))
        assert result.inside > 5 and result.locality > 0.95 and abs(result.bleeding) < 1e-6


def test_a_change_of_the_other_object_is_not_local_and_bleeds():
    for case in of_task("single"):
        (use,) = case.uses
        item, other = case.scene.objects[use.object], 1 - use.object
        spread = case.scene.with_object(other, rgb=item.rgb, accent=item.accent, texture=item.texture)
        rgb = repainted(case, use.object).objects[use.object].rgb
        before = case.scene.with_object(other, rgb=rgb, texture=TEXTURES[TEXTURES.index(item.texture) - 1])
        result = measure(case, perfect_sight(spread), perfect_sight(before))
        assert result.locality < 0.2 and result.bleeding > 0.5


def test_a_change_everywhere_is_half_local_and_no_change_is_not_measured():
    case = of_task("single")[0]
    view = perfect_sight(case.scene)
    darker = View((view.image * 0.8).astype(np.uint8), view.seen)
    assert 0.3 < measure(case, darker, view).locality < 0.7
    assert measure(case, view, view).locality is None


def test_the_second_of_two_objects_of_one_class_is_the_right_one():
    case = of_task("same word")[0]
    assert [use.target.split("#")[1] for use in case.uses] == ["1", "2"]
    scene = dataclasses.replace(case.scene, objects=case.scene.objects[::-1])
    view = perfect_sight(scene)
    assert measure(case, view, view).cp == pytest.approx(1)


def test_directions_of_each_kind_are_reached_by_the_true_scene_and_not_by_others():
    kinds = []
    for case in of_task("direction"):
        (use,) = case.uses
        kind, value = use.named
        kinds.append(kind)
        assert parse_caption(f"a star {case.attribute}" if use.object is None else case.attribute)
        words = value.split()[-1] if kind != "warmth" else f"{value} light"
        assert words in case.attribute and words not in case.neutral
        assert case.neutral.split()[-1] in case.attribute
        view = perfect_sight(case.scene)
        result = measure(case, view, view)
        assert result.reached == 1 and result.kept == 1 and f"reached: {kind}" in result.parts
        assert result.light == (None if use.object is None else 1)
        if use.object is None:
            opposite = {"warmth": -case.scene.light.warmth} if kind == "warmth" else {"azimuth": 270.0}
            if value == "above":
                opposite = {"azimuth": 5.0}
            other = dataclasses.replace(case.scene, light=dataclasses.replace(case.scene.light, **opposite))
        else:
            changes = {
                "color": {"color": "white" if value != "white" else "red"},
                "texture": {"texture": "plain"},
                "pose": {"rotation": 0.0},
            }[kind]
            other = case.scene.with_object(use.object, **changes)
        assert measure(case, perfect_sight(other), view).reached == 0
        assert measure(case, perfect_sight(other), view).kept == 1
    assert {kinds.count(kind) for kind in ("color", "texture", "pose")} == {8}
    assert kinds.count("warmth") + kinds.count("direction") == 8


def test_a_neighbour_or_a_light_that_changes_is_not_kept():
    for case in of_task("single"):
        (use,) = case.uses
        view, other = perfect_sight(case.scene), 1 - use.object
        changed = perfect_sight(repainted(case, other))
        assert (measure(case, view, view).kept, measure(case, changed, view).kept) == (1, 0)
        slightly = [channel + (8 if channel < 128 else -8) for channel in case.scene.objects[other].rgb]
        lighter = perfect_sight(case.scene.with_object(other, rgb=tuple(slightly)))
        assert measure(case, lighter, view).kept == 1  # whatever the two colours are called
        without = dataclasses.replace(case.scene, objects=case.scene.objects[use.object :][:1])
        assert measure(case, perfect_sight(without), view).kept == 0  # it has gone
        assert measure(case, view, perfect_sight(without)).kept is None  # it was never there
        light = dataclasses.replace(case.scene.light, warmth=-case.scene.light.warmth)
        other_light = perfect_sight(dataclasses.replace(case.scene, light=light))
        assert (measure(case, view, view).light, measure(case, other_light, view).light) == (1, 0)


def test_likeness_of_looks():
    item = IMAGES[0].scene.objects[0]
    look = Appearance(rgb=item.rgb, texture="dotted", rotation=30.0)
    heart = dataclasses.replace(item, shape="heart", rotation=75.0)
    textures = np.array([0.1, 0.1, 0.7, 0.05, 0.05])
    assert object_likeness(look, heart, textures) == pytest.approx({"color": 1.0, "texture": 0.7, "pose": 0.5})
    assert "pose" not in object_likeness(look, dataclasses.replace(item, shape="circle"), textures)
    light = dataclasses.replace(IMAGES[0].scene.light, azimuth=100.0, warmth=-0.5)
    parts = light_likeness(Appearance(warmth=0.0, azimuth=55.0), light)
    assert parts == pytest.approx({"warmth": 0.5, "direction": 0.5})


# The figures, with the shipped judge.


def test_the_judge_gives_true_scenes_high_marks_and_others_low_ones():
    judge = Judge.load()
    cases = [case for task in TASKS for case in of_task(task)[:8]]

    def views(scenes):
        images = np.stack([render_scene(scene, SIZE).image for scene in scenes])
        return [View(*pair) for pair in zip(images, judge.look(images), strict=True)]

    true = views([case.scene for case in cases])
    wrong = views([repainted(case, *range(len(case.scene.objects))) for case in cases])
    right = [measure(case, view, view) for case, view in zip(cases, true, strict=True)]
    off = [measure(case, view, view) for case, view in zip(cases, wrong, strict=True)]
    objects = [all(use.object is not None for use in case.uses) for case in cases]
    assert np.mean([one.cp for one in right]) > 0.85
    assert np.mean([one.pf for one in right]) > 0.93
    assert np.mean([one.cp for one, about in zip(off, objects, strict=True) if about]) < 0.35


# The table.


def record(row: str, case: int, values: list[float], unit: int | None = None) -> dict:
    def measured(value):
        names = ("locality", "inside", "outside", "bleeding", "reached", "kept", "light")
        return {"cp": value, "pf": 1.0, "cp_pf": value, "parts": {"CP: color": value}, **dict.fromkeys(names)}

    unit = case if unit is None else unit
    return {"row": row, "task": "full", "unit": unit, "case": case, "seeds": [measured(value) for value in values]}


def test_a_unit_counts_once():
    records = [record("a", 0, [0.0, 0.2], unit=0), record("a", 1, [0.4, 0.6], unit=0), record("a", 2, [0.5], unit=1)]
    mean = summarize(records, "a")["full"]["a"].means["cp"]
    assert mean.mean == pytest.approx(0.4) and mean.count == 2


def test_rows_are_compared_pair_by_pair():
    easy_and_hard = [0.9, 0.1, 0.5, 0.3]
    records = [record("a", i, [value]) for i, value in enumerate(easy_and_hard)]
    records += [record("b", i, [value + 0.05]) for i, value in enumerate(easy_and_hard)]
    figures = summarize(records, "a")["full"]
    assert figures["b"].against.mean == pytest.approx(0.05) and figures["b"].against.half_width < 1e-9
    assert figures["a"].against is None and figures["b"].means["cp"].half_width > 0.3


def test_only_cases_that_all_rows_have_are_compared():
    records = [record("a", 0, [1.0]), record("a", 1, [0.0]), record("b", 0, [1.0])]
    assert [(r["row"], r["case"]) for r in complete(records)] == [("a", 0), ("b", 0)]
    assert "| a |" in (text := markdown(records, ["b", "a"], "a")) and text.index("| b |") < text.index("| a |")


# A whole run.

LEARN = LearnConfig(
    concept_mod=ConceptModConfig(hidden=8, block_hidden=6),
    stage_1=StageConfig(steps=1, high_share=0.9),
    stage_2=StageConfig(steps=0, high_share=0.1),
    flip=False,
    optimizer=OptimizerConfig(learning_rate=1e-3),
    isolation=IsolationConfig(captions=("a dog",), probability=1.0, template="two {left} beside {right}"),
)
CONFIG = BenchConfig(
    model="", images=4, seeds=2, size=16, learn=LEARN, sampling=SamplingConfig(num_steps=1), batch_size=8
)


def test_rows_leave_parts_of_the_method_out():
    rows = {row.name: row for row in make_rows(LEARN, (1.0,))}
    learned = ["M", "text embeddings", "M+", "M+, per block", FULL]
    assert list(rows) == [PROMPT, *learned, "M direction x 1", "M+ direction x 1"]
    assert rows[FULL].learn == LEARN and rows["M+, per block"].learn == dataclasses.replace(LEARN, isolation=None)
    assert rows["M+"].learn == dataclasses.replace(LEARN, isolation=None, per_block=False)
    assert rows["M+"].takes("full") and not rows["M+"].takes("direction") and rows[PROMPT].takes("direction")


def test_a_run_may_have_some_rows_only():
    rows = dataclasses.replace(CONFIG, rows=(FULL,)).make_rows()
    assert [row.name for row in rows] == [PROMPT, FULL]  # others are measured against the prompt's images


def test_images_may_be_pictures_from_elsewhere(tmp_path):
    subprocess.run([sys.executable, "benchmarks/drawings.py", "--out", str(tmp_path)], check=True)
    images = read_images(tmp_path, 16)
    assert len(images) == 16 and len(make_cases(images, seed=0)) == 40
    for image in images:
        assert image.pixels(SIZE).shape == (SIZE, SIZE, 3) and image.path.suffix == ".png"
        assert all(caption.count("a drawing of") == 1 and parse_caption(caption) for caption in image.captions)
        assert len(image.words) == 2  # a drawing without shading has no light to learn
    seen = Judge.load().look(np.stack([image.pixels(SIZE) for image in images]))
    both = ((image.scene, view.scene) for image, view in zip(images, seen, strict=True))
    names = [[{(item.shape, item.color) for item in scene.objects} for scene in pair] for pair in both]
    found = [mine & others for mine, others in names]
    assert sum(map(len, found)) >= 0.8 * 2 * len(images)  # the judge reads them, though it has seen none
    config = build(BenchConfig, load("tokenverse_bench:drawings", [f"pictures={tmp_path}"]))
    Bench.open(config, tmp_path / "bench")  # binds all captions, also beside those of the isolation loss
    with pytest.raises(ValueError, match=r"16 files \*\.png, but images=20 are needed"):
        read_images(tmp_path, 20)
    (tmp_path / "03.json").write_text("{}")
    with pytest.raises(ValueError, match=r"03\.json: not a scene"):
        read_images(tmp_path, 4)
    (tmp_path / "00.json").unlink()
    with pytest.raises(ValueError, match=r"00\.json: no such file; the scene of 00\.png is needed"):
        read_images(tmp_path, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("M++",)}, r"rows: no M\+\+; there are prompt only, M, "),
        ({"learn": dataclasses.replace(LEARN, flip=True)}, "mirroring"),
        ({"learn": dataclasses.replace(LEARN, isolation=None)}, "full method"),
        ({"batch_size": 7}, "multiple of seeds"),
    ],
)
def test_a_config_that_would_mislead_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_whole_run_resumes_and_refuses_another_config(tmp_path, monkeypatch):
    folder = write_tiny_pipeline(tmp_path / "model")
    file = folder / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 200}))
    config = dataclasses.replace(CONFIG, model=str(folder), cache=str(tmp_path / "pool"))
    learn, calls = Learner.learn, []

    def signalled(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return learn(*args)

    stopped = pytest.raises(StoppedError, match=r"^stopped by SIGTERM; the same command goes on from there$")
    with stopped, monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", signalled)
        bench(config, tmp_path / "bench")
    assert len(list(tmp_path.glob("bench/concepts/*/*.safetensors"))) == 3
    workdir = bench(config, tmp_path / "bench")
    lines = [json.loads(line) for line in (workdir / "measurements.jsonl").read_text().splitlines()]
    learned = {"M", "text embeddings", "M+", "M+, per block", FULL}
    assert {line["row"] for line in lines if line["task"] == "full"} == learned | {PROMPT, RENDERED}
    assert all(len(line["seeds"]) == 2 for line in lines)
    assert all(m["bleeding"] in (None, 0) for line in lines if line["row"] == PROMPT for m in line["seeds"])
    table, before = (workdir / "table.md").read_text(), (workdir / "measurements.jsonl").read_text()
    assert all(f"### {task}" in table for task in ("composition", "decomposition", "full", "single", "direction"))
    assert (workdir / "full.png").is_file() and len(list(workdir.glob("concepts/*/*.safetensors"))) == 4 * 5

    # A line that was cut short is measured again, a picture that is missing drawn again; nothing is learned again.
    monkeypatch.setattr(Learner, "learn", None)
    (workdir / "measurements.jsonl").write_text(before[:-40])
    next(workdir.glob("images/M/*.png")).unlink()
    bench(config, workdir)
    assert (workdir / "measurements.jsonl").read_text() == before and (workdir / "table.md").read_text() == table
    with pytest.raises(ValueError, match="another config"):
        bench(dataclasses.replace(config, seed=1), workdir)
