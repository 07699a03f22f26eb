"""`tokenize`, `sample` and `evaluate`: two processes do the work of one, and a signal ends it cleanly."""

import dataclasses
import json
import os
import signal
import time

import pytest
from generator_run_tools import TOKENIZER, random_generator, random_tokenizer, write_pictures
from several_tools import ended, launched

from mergevq_jax import cli
from mergevq_jax.tokenizer.model import Tokenizer
from mergevq_jax.tokens_folder import read_tokens
from mini_scenes import MiniScenes, MiniScenesConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Models, pictures, and scenes of 16 pixels."""
    root = tmp_path_factory.mktemp("commands")
    write_pictures(root / "pictures")
    tokenizer = random_tokenizer()
    tokenizer.save_pretrained(root / "tokenizer")
    random_generator(tokenizer, str(root / "tokenizer")).save_pretrained(root / "generator")
    random_tokenizer(config=dataclasses.replace(TOKENIZER, resolution=16, keep=40)).save_pretrained(root / "larger")
    scenes = MiniScenesConfig(name="16", size=16, train=1, validation=1, test=70)
    MiniScenes(data_dir=str(root / "data"), config=scenes).download_and_prepare()
    return root


def lines(root, folder):
    """The command lines, which write into the folder."""
    return [
        f"tokenize --tokenizer {root}/tokenizer --folder {root}/pictures --keep 12 --batch-size 2 --shard-size 3 "
        f"--out {folder}/tokens",
        f"sample --model {root}/generator --num 7 --batch-size 2 --out {folder}/samples",
        f"evaluate reconstruction --tokenizer {root}/larger --data-dir {root}/data --keep 40 64 --num-images 70 "
        f"--out {folder}/report",
        f"evaluate generation --model {root}/generator --num-images 70 --cfg-scale 1 2 --reference {root}/pictures "
        f"--out {folder}/quality",
    ]


def commands(root, folder, processes, how="whole", at="0:0"):
    """All of them under launch.run."""
    chain = [f"mergevq_jax.cli {line}" for line in lines(root, folder)]
    return launched(processes, ["tests/hooked.py", how, at, *chain], devices=1)


def assert_equal(folder, other):
    ours, theirs = (list(read_tokens(path / "tokens")) for path in (folder, other))
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)
    for name in ("tokens/tokens.json", "samples/samples.npz", "samples/samples.png"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("report", "quality"):
        ours, theirs = ({file.name: file.read_bytes() for file in (path / name).iterdir()} for path in (folder, other))
        assert ours == theirs and "results.json" in ours
    ours, theirs = (json.loads((path / "samples/protocol.json").read_text()) for path in (folder, other))
    assert ours | {"measured": None} == theirs | {"measured": None}
    assert not (folder / "samples/parts").exists() and not list(folder.rglob(".*"))


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(root, tmp_path):
    """Also after SIGTERM, when complete shards are kept, and after a process was killed in an evaluation."""
    code, _, err = ended(commands(root, tmp_path / "1", 1))
    assert code == 0, err
    run, tokens = commands(root, tmp_path / "2", 2, "slowly", "0:0.5"), tmp_path / "2" / "tokens"
    while not list(tokens.glob("tokens-*")):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    code, out, err = ended(run, timeout=30)
    assert code == 143 and out.count("stopped by SIGTERM") == 1 and "the same command writes the others" in out, err
    assert 1 <= len(list(tokens.glob("*.array_record"))) < 4 and not list(tokens.glob(".*"))
    code, _, err = ended(commands(root, tmp_path / "2", 2, "in-part", "2:1"))
    assert code == 75, err
    assert not (tmp_path / "2" / "report" / "parts" / "0-0" / "000001.npz").exists()
    code, out, err = ended(commands(root, tmp_path / "2", 2))
    assert code == 0 and out.count("10 images in 4 shards") == 1, err
    assert_equal(tmp_path / "2", tmp_path / "1")


@pytest.mark.parametrize(
    ("number", "method", "says", "kept"),
    [
        (0, "encode", "; complete shards are in ", "tokens/tokens-00000-of-00004.array_record"),
        (1, "decode", "; the same command draws the batches that are missing", "samples/parts/000000.npz"),
    ],
)
def test_a_signal_ends_a_command_after_a_batch(root, tmp_path, capsys, monkeypatch, number, method, says, kept):
    """The same command, again, gives what it would have given."""
    arguments, whole = (lines(root, tmp_path / name)[number].split() for name in ("stopped", "whole"))
    calls, do = [], getattr(Tokenizer, method)

    def signalled(*args, **options):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return do(*args, **options)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, method, signalled)
        assert cli.main(arguments) == 143 and len(calls) == 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"stopped by SIGTERM{says}" in capsys.readouterr().out
    assert (tmp_path / "stopped" / kept).is_file()
    assert cli.main(arguments) == cli.main(whole) == 0
    results = [
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file() and path.name != "protocol.json"  # which has times
        }
        for name in ("stopped", "whole")
    ]
    assert results[0] == results[1]
