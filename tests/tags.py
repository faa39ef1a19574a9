"""A small run on tag sequences: three tags, dev and test sets, six rounds."""

import pytest
import torch
import yaml

WORDS = {"D": ["the", "a"], "N": ["dog", "cat", "bird", "tree"], "V": ["sees", "runs", "is"]}
SETTINGS = {
    "features": {"num_buckets": 64, "max_affix": 2},
    "inference_net": {"hidden_size": 4, "embedding_size": 4, "dropout": 0.2},
    "energy": {"features": {"hidden_size": 3, "embedding_size": 3, "dropout": 0.2}},
    "inner": {"batch_size": 5, "steps": 2, "optimizer": {"learning_rate": 0.01}},
    "outer": {"batch_size": 7, "objective": "nce", "task_weight": 1.0, "num_samples": 3},
    "solver": {"max_steps": 3, "damping": 1.0},
    "train": {
        "warmup_rounds": 2, "max_outer_steps": 4, "eval_every": 2, "checkpoint_every": 2,
        "keep_checkpoints": 9, "num_threads": 1, "average_decay": 0.8,
    },
}  # fmt: skip


def tagged_text(num_sentences: int, seed: int) -> str:
    draw = torch.Generator().manual_seed(seed)

    def pick(tag: str) -> str:
        words = WORDS[tag]
        return f"{words[int(torch.randint(len(words), (), generator=draw))]}\t{tag}"

    patterns = (["D", "N", "V"], ["D", "N", "V", "D", "N"], ["N", "V"])
    sentences = []
    for _ in range(num_sentences):
        pattern = patterns[int(torch.randint(3, (), generator=draw))]
        sentences.append("\n".join(pick(tag) for tag in pattern) + "\n")
    return "\n".join(sentences)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The configuration file of such a run, beside its data."""
    folder = tmp_path_factory.mktemp("data")
    for name, size, seed in (("train", 22, 0), ("dev", 6, 1), ("test", 6, 2)):
        (folder / f"{name}.conll").write_text(tagged_text(size, seed))
    data = {
        "root": str(folder), "train": ["train.conll"], "dev": "dev.conll", "test": "test.conll",
        "extra": {"again": "test.conll"},
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"data": data, **SETTINGS}))
    return path
