"""DeiT pruned by Torch-Pruning, for comparison: its importances and scopes, to the same MACs, without any training.

    python -m tests.ablations.torch_pruned --model MODEL_DIR --images DIR --classes FILE.tsv --out runs/torch_pruned

Needs torch-pruning and timm beside PyTorch: pip install --no-deps torch-pruning timm. The images are split, and a draw
of them is taken, as in tests/ablations/one_shot.py. Importances are taken as they come ("shipped") and with
normalizer=None. Two faults of the shipped GroupHessianImportance (1.6) are mended in the latter: its dictionaries are
asked for a parameter's name and filled under the parameter, so that of all gradients the last alone is kept. The
pruning ratio for the MACs is found by bisection. Every result is kept under --out at once, so that a stopped run goes
on.
"""

import argparse
import copy
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nvit_jax.data import datasets
from nvit_jax.files import read_json, write_json
from nvit_jax.formats import interchange
from nvit_jax.model.dims import count_macs
from nvit_jax.model.directory import Model, load_model
from nvit_jax.model.preprocessing import Preprocessing
from tests import sources
from tests.ablations.halves import halves

BATCH = 20
IMPORTANCES = ("magnitude", "taylor", "hessian")
SCOPES = {"local": {}, "global": {"global_pruning": True}, "isomorphic": {"global_pruning": True, "isomorphic": True}}


def module_of(model: Model) -> torch.nn.Module:
    """timm's ViT of the same dims, with the model's weights."""
    timm, dims = sources.import_timm(), model.dims
    module = timm.models.vision_transformer.VisionTransformer(
        img_size=dims.image,
        patch_size=dims.patch,
        num_classes=dims.classes,
        embed_dim=dims.embed,
        depth=dims.depth,
        num_heads=dims.heads[0],
    )
    state = interchange.to_torch(dims, model.params)
    module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    for block in module.blocks:
        block.attn.fused_attn = False
        block.attn.forward = _forward.__get__(block.attn)
    return module.eval()


def _forward(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """timm's attention, whatever the width of a head."""
    q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
    return self.proj((weights @ v).transpose(1, 2).reshape(*x.shape[:2], -1))


def macs(module: torch.nn.Module, tokens: int, dims: Any) -> float:
    """As `count_macs`, from the widths of the layers."""
    embed = module.head.in_features
    total = dims.patches * embed * 3 * dims.patch**2 + embed * dims.classes
    for block in module.blocks:
        width, hidden = block.attn.qkv.out_features // 3, block.mlp.fc1.out_features
        total += tokens * embed * (4 * width + 2 * hidden) + 2 * tokens**2 * width
    return float(total)


def gradients(module: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, importance: Any, name: str) -> None:
    """What an importance is made of: of the mean loss, or of each image's."""
    module.zero_grad()
    if name == "hessian":
        for image, label in zip(images, labels, strict=True):
            module.zero_grad()
            torch.nn.functional.cross_entropy(module(image[None]), label[None]).backward()
            importance.accumulate_grad(module)
    elif name == "taylor":
        for i in range(0, len(images), BATCH):
            loss = torch.nn.functional.cross_entropy(module(images[i : i + BATCH]), labels[i : i + BATCH])
            (loss * len(labels[i : i + BATCH]) / len(labels)).backward()


def importance_of(name: str, *, shipped: bool) -> Any:
    import torch_pruning as tp

    kinds = {"magnitude": "GroupMagnitude", "taylor": "GroupTaylor", "hessian": "GroupHessian"}
    kind = getattr(tp.importance, f"{kinds[name]}Importance")
    if shipped:
        return kind()
    found = kind(normalizer=None)
    if name == "hessian":

        def accumulate(module: torch.nn.Module) -> None:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    square = parameter.grad.detach() ** 2
                    found._accu_grad[parameter] = found._accu_grad.get(parameter, 0) + square
                    found._counter[parameter] = found._counter.get(parameter, 0) + 1

        found.accumulate_grad = accumulate
    return found


def pruned(
    module: torch.nn.Module,
    ready: Callable[[torch.nn.Module, Any], None],
    name: str,
    shipped: bool,
    scope: str,
    part: float,
) -> torch.nn.Module:
    """One pruning with the pruning ratio `part` of every layer (or of all together)."""
    import torch_pruning as tp

    small = copy.deepcopy(module)
    for block in small.blocks:
        block.attn.forward = _forward.__get__(block.attn)
    importance = importance_of(name, shipped=shipped)
    ready(small, importance)
    pruner = tp.pruner.BasePruner(
        small,
        torch.zeros(1, 3, *small.patch_embed.img_size),
        importance,
        pruning_ratio=part,
        ignored_layers=[small.head],
        num_heads={block.attn.qkv: block.attn.num_heads for block in small.blocks},
        **SCOPES[scope],
    )
    pruner.step()
    return small


def result_table(found: dict[str, Any]) -> str:
    """Markdown: a row for each importance and scope, top-1 at the MACs that were reached in the columns."""
    cells = {tuple(key.split(" | ")): value for key, value in found.items() if key != "dense"}
    ratios = sorted({float(key[3]) for key in cells}, reverse=True)
    lines = ["| importance | normalizer | scope | " + " | ".join(f"MACs {ratio:g}: top-1" for ratio in ratios) + " |"]
    lines.append("|---|---|---|" + "---|" * len(ratios))
    for row in dict.fromkeys(key[:3] for key in cells):
        own = [cells.get((*row, f"{ratio}")) for ratio in ratios]
        shown = ["not run" if c is None else f"{c['top1']:.1%} (at {c['macs']:.3f})" for c in own]
        lines.append("| " + " | ".join((*row, *shown)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "images", "classes", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.8, 0.65, 0.5])
    parser.add_argument("--importances", nargs="*", choices=IMPORTANCES, default=list(IMPORTANCES))
    parser.add_argument("--scopes", nargs="*", choices=list(SCOPES), default=list(SCOPES))
    parser.add_argument("--count", type=int, default=100, help="images for the gradients")
    options = parser.parse_args()
    model = load_model(options.model)
    pre = Preprocessing.from_json(model.info["preprocessing"])
    train, judged = halves(options.images, options.classes, pre)
    chosen = train.take(np.random.default_rng(0).permutation(len(train))[: options.count])

    def tensors(split: datasets.Split) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = split.read()
        return torch.from_numpy(np.array(pre(images))).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))

    scored, judged = tensors(chosen), tensors(judged)

    @torch.no_grad()
    def top1(module: torch.nn.Module) -> float:
        found = [module(judged[0][i : i + BATCH]).argmax(-1) for i in range(0, len(judged[0]), BATCH)]
        return float((torch.cat(found) == judged[1]).double().mean())

    module, dims, kept = module_of(model), model.dims, options.out / "cells.json"
    whole = macs(module, dims.tokens, dims)
    assert whole == count_macs(dims), "the two count alike"
    options.out.mkdir(parents=True, exist_ok=True)
    found = read_json(kept) if kept.exists() else {"dense": top1(module)}
    print(f"unpruned: {found['dense']:.1%}", flush=True)
    for name in options.importances:
        for shipped in (False, True):
            cache: dict[str, Any] = {}

            def ready(small: torch.nn.Module, importance: Any, name: str = name, cache: dict[str, Any] = cache) -> None:
                """Gradients are computed once and given to every copy."""
                if "grads" not in cache:
                    gradients(small, *scored, importance, name)
                    cache["grads"] = [p.grad for p in small.parameters()]
                    cache["squares"] = [getattr(importance, "_accu_grad", {}).get(p) for p in small.parameters()]
                    cache["counts"] = [getattr(importance, "_counter", {}).get(p) for p in small.parameters()]
                rows = zip(small.parameters(), cache["grads"], cache["squares"], cache["counts"], strict=True)
                for parameter, gradient, square, count in rows:
                    parameter.grad = None if gradient is None else gradient.clone()
                    if square is not None:
                        importance._accu_grad[parameter], importance._counter[parameter] = square.clone(), count

            for scope in options.scopes:
                for ratio in options.ratios:
                    key = f"{name} | {'shipped' if shipped else 'normalizer=None'} | {scope} | {ratio}"
                    if key in found:
                        continue
                    low, high, best = 0.0, 0.9, None
                    for _ in range(7):
                        part = (low + high) / 2
                        small = pruned(module, ready, name, shipped, scope, part)
                        if macs(small, dims.tokens, dims) <= ratio * whole:
                            high, best = part, small
                        else:
                            low = part
                    if best is not None:
                        found[key] = {"top1": top1(best), "macs": macs(best, dims.tokens, dims) / whole}
                        write_json(kept, found)
                        print(f"{key}: {found[key]['top1']:.1%} at {found[key]['macs']:.3f}", flush=True)
    print(f"\n{result_table(found)}")


if __name__ == "__main__":
    main()
