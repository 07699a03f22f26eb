"""What a judge outside of this library is asked, and its answers: scores from 0 to 4 in DreamBench++'s protocol.

requests.jsonl has a line for each question: `id`, `kind`, `images` (paths below the output folder), `prompt`, `word`,
`masked` (whether the first image shows the concept alone), `instructions`, `scale`. An answer is a line
{"id": ..., "score": 0 to 4} of a JSONL file; other keys are ignored. Several files are repetitions: their mean counts.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime_jax.files import is_file, path_of, read_bytes
from runtime_jax.messages import cut
from tokenverse_jax.evaluate.benchmark import Benchmark
from tokenverse_jax.evaluate.draw import Job
from tokenverse_jax.evaluate.samples import SOURCE, TARGET, path

LOWEST, HIGHEST = 0, 4
STYLE = "style"  # the category that is judged by its style
CONCEPT, PROMPT = "concept preservation", "prompt following"

_SCALE = "Answer with one whole number from 0 to 4 and nothing else."
_CONCEPT = """\
Two images follow: a reference and a generated image. Judge how well {what} of the reference is kept in the generated \
image. Compare {features}. Leave out everything else: background, arrangement and the quality of the image don't \
count.{mask}
0: absent, or nothing in common. 1: the same kind of thing, but clearly another one. 2: some features agree, others \
clearly differ. 3: the same but for small differences. 4: no difference that matters.
{scale}"""
_MASK = " The reference shows only this concept; the white around it is not a part of it."
_PROMPT = """\
An image follows that was generated for the text {prompt!r}. Judge how well the image shows what the text says: every \
thing and action that it names, their attributes and relations, the place, and the kind of picture if it names one.
0: none of it. 1: the general subject, but most of the rest is missing. 2: about half; important parts are missing or \
wrong. 3: nearly all, with small omissions. 4: all of it.
{scale}"""
_SUBJECT = "shape and proportions, colours, surface and pattern, and the face if there is one"
_STYLE = "colours, strokes and textures, level of detail, and the mood"


def make_requests(jobs: Sequence[Job], benchmark: Benchmark) -> list[dict[str, Any]]:
    """All questions: CP for each concept of an image, against its reference, and PF."""
    requests = []
    for job in jobs:
        item = job.item
        target = path(TARGET, item.names[0], job.image)
        for name, use in zip(item.names, item.uses, strict=True):
            styled = benchmark.pictures[use.image].category == STYLE
            masked = benchmark.is_masked(use.image, use.word)
            instructions = _CONCEPT.format(
                what="the style" if styled else f"the concept {use.word!r}",
                features=_STYLE if styled else _SUBJECT,
                mask=_MASK if masked else "",
                scale=_SCALE,
            )
            requests.append(
                {
                    "id": f"cp/{name}_{job.image}",
                    "kind": CONCEPT,
                    "task": item.task,
                    "images": [path(SOURCE, name, job.image), target],
                    "prompt": item.prompt,
                    "word": use.word,
                    "masked": masked,
                    "instructions": instructions,
                    "scale": [LOWEST, HIGHEST],
                }
            )
        requests.append(
            {
                "id": _prompt_id(job),
                "kind": PROMPT,
                "task": item.task,
                "images": [target],
                "prompt": item.prompt,
                "instructions": _PROMPT.format(prompt=item.prompt, scale=_SCALE),
                "scale": [LOWEST, HIGHEST],
            }
        )
    return requests


def _prompt_id(job: Job) -> str:
    return f"pf/{job.item.names[0]}_{job.image}"


def _concept_ids(job: Job) -> list[str]:
    return [f"cp/{name}_{job.image}" for name in job.item.names]


def read_answers(files: Sequence[str | os.PathLike], jobs: Sequence[Job]) -> dict[str, float]:
    """The mean score of each request, from 0 to 1.

    Raises:
      ValueError: a file that is missing; a line that is no answer, or a second one to a request; an unknown request; a
        score that is not a whole number from 0 to 4; requests without an answer.
    """
    wanted = [name for job in jobs for name in (*_concept_ids(job), _prompt_id(job))]
    each = [_read(file, wanted) for file in files]
    return {name: float(np.mean([answers[name] for answers in each])) / HIGHEST for name in wanted}


def _read(file: str | os.PathLike, wanted: Sequence[str]) -> dict[str, int]:
    source, known = path_of(file), set(wanted)
    if not is_file(source):
        raise ValueError(f"{file}: no such file")
    answers: dict[str, int] = {}
    for number, line in enumerate(read_bytes(source).decode("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            answer = json.loads(line)
            name, score = answer["id"], answer["score"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file}:{number}: not an answer of the form {{"id": ..., "score": ...}}') from error
        if name not in known:
            raise ValueError(f"{file}:{number}: there is no request {name!r}")
        if name in answers:
            raise ValueError(f"{file}:{number}: a second answer to {name!r}")
        if type(score) is not int or not LOWEST <= score <= HIGHEST:
            raise ValueError(f"{file}:{number}: score {score!r} of {name!r}: a whole number from 0 to 4 is needed")
        answers[name] = score
    if missing := [name for name in wanted if name not in answers]:
        raise ValueError(f"{file}: {len(missing)} of {len(wanted)} requests have no answer: {cut(missing, most=3)}")
    return answers


def figures(answers: Mapping[str, float], jobs: Sequence[Job]) -> list[dict[str, float]]:
    """For each image CP, the mean over its concepts, and PF."""
    return [
        {"CP": float(np.mean([answers[name] for name in _concept_ids(job)])), "PF": answers[_prompt_id(job)]}
        for job in jobs
    ]
