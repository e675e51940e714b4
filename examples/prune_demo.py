"""Prune the demo's model in ten lines: half of its MACs, then the accuracy back by distillation.

    python examples/prune_demo.py runs/demo/pretrain/model

The model is what `nvit-jax run --config demo --workdir runs/demo --stage pretrain` trains: a small Vision Transformer
on scikit-learn's scans of digits. Half a minute on two cores.
"""

import sys

import nvit_jax as nvit


def main(path: str, epochs: float = 5.0) -> None:
    """Print the accuracy of the dense, the pruned and the finetuned model."""
    data = nvit.load_dataset("digits")
    model = nvit.load(path)
    found = nvit.prune(model, data, macs=0.5)
    small = nvit.finetune(found.model, data, teacher=model, epochs=epochs, learning_rate=1e-3)
    for name, one in (("dense", model), ("pruned", found.model), ("finetuned", small)):
        print(f"{name:10} {nvit.evaluate(one, data, progress=False)['top1']:.2%}  {one!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
