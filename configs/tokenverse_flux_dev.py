"""Learns concepts from an image with FLUX.1-dev and the hyperparameters of the paper.

    tokenverse learn --config tokenverse_flux_dev --workdir runs/doll \
        --config.images="[{'path': 'doll.jpg', 'captions': ['a doll wearing a hat', 'a hat on a doll']}]" \
        --config.words="['doll', 'hat']" --config.prompts="['a doll on the moon']"

The paper uses 8 captions per image: plain ones, each naming all words to learn, in different orders. If the captions
tell left from right, set --config.learn.flip=False. --config.mesh.tensor splits the model over several devices, which
then learn from one image at a time.
"""

from ml_collections import ConfigDict

POOL = (
    "a dog running on a beach",
    "a cat asleep on a sofa",
    "a woman drinking coffee in a cafe",
    "a man riding a bicycle through a city",
    "two children playing in the snow",
    "a red car parked under a tree",
    "a wooden table with a bowl of fruit",
    "a lighthouse on a cliff at sunset",
    "a horse in a green meadow",
    "a vase of flowers by a window",
    "a bird on a branch",
    "a train crossing a bridge",
    "a chef cooking in a kitchen",
    "a bookshelf beside an armchair",
    "a boat on a calm lake",
    "a girl with a balloon in a park",
    "an old man reading a newspaper",
    "a teddy bear on a bed",
    "a street market at night",
    "a mountain behind a forest",
    "a guitar leaning against a wall",
    "a pair of shoes on a wooden floor",
    "a slice of cake on a plate",
    "a robot standing in a field",
    "a castle in the mist",
)


def get_config() -> ConfigDict:
    """Everything except the images, their captions and the words to learn."""
    return ConfigDict(
        {
            "model": "black-forest-labs/FLUX.1-dev",
            "dtype": "bfloat16",
            "compute": {"dtype": "bfloat16", "attention": "auto", "remat": True},
            "images": [],
            "words": [],
            "size": 512,
            "learn": {
                "concept_mod": {"hidden": 3072, "block_hidden": 512},
                "stage_1": {"steps": 800, "high_share": 0.92},
                "stage_2": {"steps": 600, "high_share": 0.08},
                "boundary": 0.8,
                "batch_size": 1,
                "optimizer": {"learning_rate": 1e-4, "warmup": {"steps": 20}},
                "guidance": 1.0,
                "flip": True,
                "isolation": {"captions": POOL, "probability": 0.5, "weight": 10.0},
            },
            "sampling": {"num_steps": 28, "guidance": 3.5},
        }
    )
