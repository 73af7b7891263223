"""PEFT's LoRA adapters, whose updates are added to the base's tensors as these are read.

W + scale * B A, of A [R, in] and B [out, R] per module (Hu et al., arXiv 2106.09685); scale is alpha / R, or
alpha / sqrt(R) with `use_rslora`.
"""

import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from flax.traverse_util import flatten_dict

import qsharp_jax.models.hf.files as files
import qsharp_jax.models.hf.hub as hub
from qsharp_jax.models import sharding
from qsharp_jax.models.leaves import Place
from qsharp_jax.system.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the tensors' names
_LORA = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight")
# Supported values of entries that change what an adapter computes, the first of which is the default.
_COMPUTED: dict[str, tuple] = dict(
    use_dora=(False, None), bias=("none",), lora_bias=(False, None), use_qalora=(False, None),
    layer_replication=(None, []), alora_invocation_tokens=(None,), target_parameters=(None, []),
    trainable_token_indices=(None,), use_bdlora=(None, False), kasa_config=(None,), monteclora_config=(None,),
    arrow_config=(None,), velora_config=(None,),
    init_lora_weights=(True, False, "gaussian", "eva", "orthogonal"),  # others change the base's weights
)  # fmt: skip

# --- In -------------------------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """An adapter's folder."""

    folder: Path
    base: Path  # folder or GGUF file of the model that it changes
    entries: dict[str, Any]  # of adapter_config.json


def find(folder: str | Path) -> Adapter | None:
    """The adapter in a folder, without reading its weights; None if it holds none.

    Raises:
      UserError: for an adapter that is damaged, of another type than LoRA, or whose base is not there.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        return None
    if (folder / files.SINGLE).is_file() or (folder / files.INDEX).is_file():
        raise UserError(
            f"{folder} has an {CONFIG} beside the weights of a model; remove {CONFIG} if it is already merged into"
            " them, or the weights if it is not"
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        kind, name = entries["peft_type"], entries["base_model_name_or_path"]
        ranks = [entries["r"], entries["lora_alpha"]] if kind == "LORA" else []
        if not isinstance(name, str) or not all(isinstance(number, int | float) and number > 0 for number in ranks):
            raise ValueError("base_model_name_or_path, r or lora_alpha is not valid")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    if kind != "LORA":
        raise UserError(
            f"{folder} holds an adapter of the type {kind}, and only LORA is applied; merge it into its base first"
            " (with peft: model.merge_and_unload(), then save_pretrained), and give that folder"
        )
    for field, computed in _COMPUTED.items():
        if (value := entries.get(field, computed[0])) not in computed:
            raise UserError(
                f"{path}: {field} is {json.dumps(value)} and not {json.dumps(computed[0])}, which is not applied; merge"
                " the adapter into its base first, and give that folder"
            )
    revision = entries.get("revision")
    base = hub.find(f"{name}@{revision}" if revision and hub.is_id(name) else name)
    if not base.exists():
        raise UserError(
            f"{folder} is an adapter of {name}, which does not exist; correct base_model_name_or_path in its {CONFIG}"
        )
    if (base / CONFIG).is_file():
        raise UserError(f"{folder} is an adapter of {name}, which is an adapter itself; merge that one first")
    return Adapter(folder, base, entries)


class _Base(Protocol):
    """The tensors of a folder or of a GGUF file."""

    shapes: dict[str, tuple[int, ...]]
    stored: dict[str, str]
    readable: tuple[str, ...]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice of a tensor."""


class _Update(NamedTuple):
    a: np.ndarray  # [R, in], float32
    b: np.ndarray  # [out, R], float32, times the scale
    transposed: bool  # the tensor is [in, out]

    @property
    def shape(self) -> tuple[int, int]:
        out, width = self.b.shape[0], self.a.shape[1]
        return (width, out) if self.transposed else (out, width)

    def part(self, rows: slice, columns: slice) -> np.ndarray:
        """A slice of the update."""
        return (self.b[columns] @ self.a[:, rows]).T if self.transposed else self.b[rows] @ self.a[:, columns]


class Tensors(contextlib.AbstractContextManager):
    """The tensors of a base with an adapter: with its updates, and with the modules that it saved whole.

    Attributes:
      shapes, stored, readable: as in `files.Tensors`.
      optional: names of the base's tensors, but for the head, that the adapter leaves as they are.

    Raises:
      UserError: for files that are missing or damaged, and for tensors that do not fit the base.
    """

    def __init__(self, adapter: Adapter, base: _Base, prefix: str):
        """Read the adapter's tensors; `prefix` is the base model's name in the base's tensors."""
        self._base, self._prefix = base, prefix
        self._saved: dict[str, np.ndarray] = {}
        kinds: dict[str, str] = {}  # how these are stored
        sides: dict[str, dict[str, np.ndarray]] = {}
        with files.Tensors(adapter.folder, WEIGHTS) as own:
            for name, shape in own.shapes.items():
                readable = own.stored[name] in own.readable and 0 < len(shape) < 3
                tensor = own.read(name, (slice(None),) * len(shape)) if readable else None
                if tensor is not None and (match := _LORA.fullmatch(name)):
                    sides.setdefault(match[1], {})[match[2]] = tensor.astype(np.float32)
                elif tensor is not None and (saved := _saved_whole(name, adapter.entries)):
                    self._saved[saved], kinds[saved] = tensor, own.stored[name]
                else:
                    raise UserError(f"{adapter.folder} has the tensor {name}, which is not applied; merge it first")
        self.shapes = base.shapes | {name: tensor.shape for name, tensor in self._saved.items()}
        self.stored, self.readable = base.stored | kinds, (*base.readable, *files.Tensors.readable)
        # GPT-2's matrices are [in, out], except for the head's.
        conv = prefix == "transformer."
        self._updates = {
            self._name(module, adapter): _update(module, sides[module], adapter, conv and module != "lm_head")
            for module in sides
        }
        for name, update in self._updates.items():
            if self.shapes[name] != update.shape:
                raise UserError(
                    f"{adapter.folder} changes {name} of the shape {update.shape}, and its base {adapter.base} has it"
                    f" of the shape {self.shapes[name]}; give the base that it was trained with"
                )
        self.optional = frozenset(base.shapes) - set(self._updates) - set(self._saved) - {"lm_head.weight"}

    def __exit__(self, *_: Any) -> None:
        """The base's files are closed by whoever opened them."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice of a tensor; a changed one is float32."""
        piece = self._saved[name][index] if name in self._saved else self._base.read(name, index)
        return piece.astype(np.float32) + self._updates[name].part(*index) if name in self._updates else piece

    def _name(self, module: str, adapter: Adapter) -> str:
        """The base's tensor that a module's update is for; adapters of a base model alone lack its name."""
        names = [f"{start}{module}.weight" for start in ("", self._prefix)]
        names.append(names[0].removeprefix(self._prefix))
        if name := next((name for name in names if name in self.shapes), None):
            return name
        raise UserError(
            f"{adapter.folder} changes {names[0]}, which its base {adapter.base} does not have; give the base that it"
            " was trained with"
        )


def _saved_whole(name: str, entries: Mapping[str, Any]) -> str | None:
    """The base's name of a tensor that an adapter holds whole; None for others."""
    name = name.replace(".base_layer.", ".")  # of a module that it also updates
    module = name.removeprefix(PREFIX).rpartition(".")[0].rpartition(".")[2]
    # Heads of classifiers, and embeddings beside others that are updated, are saved without being named.
    named = {*(entries.get("modules_to_save") or ()), "score", "classifier", "lm_head", "embed_tokens", "wte"}
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) and module in named else None


def _update(module: str, sides: Mapping[str, np.ndarray], adapter: Adapter, transposed: bool) -> _Update:
    if set(sides) != {"A", "B"} or sides["A"].shape[0] != sides["B"].shape[-1]:
        raise UserError(f"{adapter.folder} is damaged: its tensors for {module} do not fit; download it again")
    rank, entries = len(sides["A"]), adapter.entries
    patterns = entries.get("alpha_pattern") or {}
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = entries["lora_alpha"] if key is None else patterns[key]
    scale = alpha / (rank**0.5 if entries.get("use_rslora") else rank)
    return _Update(sides["A"], np.float32(scale) * sides["B"], transposed)


# --- Out ------------------------------------------------------------------------------------------------------------


def write(
    rounds: Sequence[dict], places: Mapping[str, Place], alpha: float
) -> tuple[list[files.Tensor], dict[str, Any]]:
    """The tensors of an adapter, and the entries of its adapter_config.json that follow from them.

    Modules that share a tensor of the checkpoint, such as query, key and value, share an update of a larger rank.

    Args:
      rounds: as in `export_adapter`; alpha too.
      places: those of the guide's leaves.
    """
    learned = [{"/".join(path): sharding.to_host(leaf) for path, leaf in flatten_dict(of).items()} for of in rounds]
    first = learned[0]
    updates: dict[str, list[tuple[Place, np.ndarray, np.ndarray]]] = {}
    for path in [path for path in first if path.endswith("/lora_a")]:
        module = path.removesuffix("lora_a")
        a = np.concatenate([of[path] for of in learned], axis=-1)  # [L, in, R of all rounds]
        b = np.concatenate([of[f"{module}lora_b"] for of in learned], axis=-2)  # [L, R of all rounds, out]
        place = places[f"{module}kernel"]
        for layer in range(len(a)):
            name = place.name.format(layer).removesuffix(".weight")
            updates.setdefault(name, []).append((place, a[layer].T, b[layer].T))

    arrays: dict[str, np.ndarray] = {}
    for name, parts in updates.items():
        arrays[f"{name}.lora_A.weight"] = np.concatenate([a for _, a, _ in parts])
        arrays[f"{name}.lora_B.weight"] = _side_by_side(parts)
    heads = {path: leaf for path, leaf in learned[-1].items() if path.startswith("head/")}
    for path, leaf in heads.items():
        arrays[places[path].name] = leaf.T if places[path].transposed else leaf

    rank = first[next(path for path in first if path.endswith("/lora_a"))].shape[-1]
    ranks = {name.rpartition(".")[2]: len(arrays[f"{name}.lora_A.weight"]) for name in updates}
    larger = {module: of for module, of in ranks.items() if of != rank}
    tensors = [
        files.Tensor(PREFIX + name, array.dtype, array.shape, functools.partial(np.asarray, array))
        for name, array in arrays.items()
    ]
    return tensors, dict(
        peft_type="LORA", r=rank, lora_alpha=alpha, rank_pattern=larger,
        alpha_pattern={module: alpha * of / rank for module, of in larger.items()}, target_modules=sorted(ranks),
        modules_to_save=sorted({places[path].name.rpartition(".")[0] for path in heads}), lora_dropout=0.0, bias="none",
        use_rslora=False, inference_mode=True,
    )  # fmt: skip


def _side_by_side(parts: Sequence[tuple[Place, np.ndarray, np.ndarray]]) -> np.ndarray:
    """B [out, R] of a tensor from those of its parts, each with rows and ranks of its own."""
    whole = np.zeros((sum(len(b) for _, _, b in parts), sum(b.shape[1] for _, _, b in parts)), np.float32)
    rank = 0
    for place, _, b in parts:
        whole[place.offset : place.offset + len(b), rank : rank + b.shape[1]] = b
        rank += b.shape[1]
    return whole
