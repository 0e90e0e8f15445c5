"""What to convert a model to: one frozen dataclass per method."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pyfastft._codebook import ACTIVATIONS, CODEBOOKS

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PTQ4", "LoRA", "MaskedTuning"]

ALL_LINEAR = "all-linear"

_INITS = ("kaiming", "gaussian", "random")
_BIASES = ("none", "all", "lora_only")
_FLOAT32_MAX = 3.4028234663852886e38
_DTYPES = ("float32", "base")
_METHODS = ("rtn", "hqq")
_SCALE_DTYPES = ("float32", "bfloat16", "float16")
_TUNINGS = ("saft", "sara")
_LAYOUTS = ("element", "rows", "columns", "blocks")
_SAFT_DENSITY, _SARA_THRESHOLD = 1e-3, 2e-3


@dataclass(frozen=True, kw_only=True)
class Targeted:
    """What every config has that is about some of a model's modules, by PEFT's rules.

    Args:
        targets: which modules. A list: names, or the ends of names after a dot. A string: a
            regular expression that the whole name matches, or ``"all-linear"``: every nn.Linear
            and Conv1D but the output head of a transformers model.
        exclude: modules to leave alone, a list or a regular expression as ``targets``.
        layers: indices of the layers to change, one or a list; needs a list of targets.
        layers_pattern: names of the module lists that ``layers`` counts in; by default the first
            number in a module's name is its layer.
    """

    targets: str | Collection[str] = ALL_LINEAR
    exclude: str | Collection[str] = ()
    layers: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "exclude"):
            self._freeze(name, _names(name, getattr(self, name)))
        if not self.targets:
            _reject("targets", "at least one name", self.targets)
        self._freeze("layers", _layers(self.layers))
        if self.layers_pattern is not None:
            self._freeze("layers_pattern", _names("layers_pattern", self.layers_pattern))
        if self.layers_pattern and self.layers is None:
            _reject("layers", "one index or more beside layers_pattern", None)
        for name in ("layers", "layers_pattern"):
            if isinstance(self.targets, str) and getattr(self, name) is not None:
                _reject(name, "no value where targets is a string", getattr(self, name))

    def _freeze(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON's types."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v
            for name, v in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config of what :meth:`to_dict` gave; unknown keys raise ValueError."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                _reject(str(name), f"one of {', '.join(known)}", "an unknown key")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class LoRA(Targeted):
    r"""Low-rank adapters: :math:`W x + s B A x`, with PEFT's semantics.

    On linear layers, convolutions and embeddings.

    :math:`s` is alpha / r, or alpha / sqrt(r) with ``use_rslora``.

    Args:
        r: rank R of A (R, K) and B (N, R).
        alpha: scales the update.
        dropout: probability of dropping an element of the update's input while training.
        targets: which modules. A list: names, or the ends of names after a dot. A string: a
            regular expression that the whole name matches, or ``"all-linear"``: every nn.Linear
            and Conv1D but the output head of a transformers model.
        exclude: modules to leave alone, a list or a regular expression as ``targets``.
        layers: indices of the layers to convert, one or a list; needs a list of targets.
        layers_pattern: names of the module lists that ``layers`` counts in; by default the first
            number in a module's name is its layer.
        rank_pattern: regular expressions of names' ends to ranks that differ from ``r``.
        alpha_pattern: the same for ``alpha``.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).
        bias: which biases of the base model train: ``"none"``, ``"all"``, or ``"lora_only"``,
            those of the converted layers.
        lora_bias: give B a bias of its own; not on embeddings.
        init: ``"kaiming"``, A uniform as nn.Linear's and B zero; ``"gaussian"``, A normal with
            deviation 1 / r and B zero; ``"random"``, both as nn.Linear's, so that the converted
            model differs from the base at once.
        adapter_dtype: ``"float32"`` keeps the adapters wide beside a half-precision base (float64
            beside float64); ``"base"`` gives them the base's dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; the message begins with its name.

    Reference:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    use_rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    init: Literal["kaiming", "gaussian", "random"] = "kaiming"
    adapter_dtype: Literal["float32", "base"] = "float32"

    def __post_init__(self) -> None:
        _expect_rank("r", self.r)
        _expect_number("alpha", self.alpha)
        _expect_number("dropout", self.dropout)
        if not 0 <= self.dropout <= 1:
            _reject("dropout", "a probability", self.dropout)
        super().__post_init__()
        for name, expect in (("rank_pattern", _expect_rank), ("alpha_pattern", _expect_number)):
            self._freeze(name, _pattern(name, getattr(self, name), expect))
        for name in ("use_rslora", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                _reject(name, "True or False", getattr(self, name), error=TypeError)
        for name, known in (("bias", _BIASES), ("init", _INITS), ("adapter_dtype", _DTYPES)):
            if getattr(self, name) not in known:
                _reject(name, " or ".join(map(repr, known)), getattr(self, name))
        if self.lora_bias and self.init == "gaussian":
            _reject("init", "'kaiming' or 'random' beside lora_bias", self.init)

    def rank(self, name: str) -> int:
        """The rank of the module of this name."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, name), self.r)

    def scale(self, name: str) -> float:
        """s of the module of this name."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, name), self.alpha)
        rank = self.rank(name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True, kw_only=True)
class PTQ4(Targeted):
    r"""Weights in 4 bits: codes c, and a scale s and a zero-point z per group of g along K.

    .. math:: W_{nk} \approx s_{n, \lfloor k / g \rfloor} (c_{nk} - z_{n, \lfloor k / g \rfloor})

    On linear layers, and on convolutions that ``targets`` names, whose K is C / groups times the
    kernel. The targets are those of :class:`LoRA`.

    Args:
        method: ``"rtn"``, round-to-nearest with a search of the clipped range by squared error; or
            ``"hqq"``, half-quadratic quantization. Neither looks at data.
        group_size: g; -1 is one group per output.
        codebook: ``"int4"``, or with ``"rtn"`` ``"nf4"`` or ``"fp4"``, tables without zero-points.
        symmetric: z is 8; with ``"rtn"`` and int4.
        grid: how many clipped ranges ``"rtn"`` tries; 1 does not clip.
        round_zero: let z of ``"hqq"`` be an integer, which GPTQ, AWQ and compressed-tensors store;
            ``"rtn"`` is usually the better method for these.
        iterations: how many steps ``"hqq"`` takes.
        scale_dtype: ``"float32"``, ``"bfloat16"``, or ``"float16"``: scales that files with
            float16 hold exactly, kept in float32.
        activations: ``"int8"`` rounds what comes into a linear layer to 8 bits, with a scale for
            each row and group found on the way, see
            :func:`pyfastft.functional.int4_linear_a8`; beside the codebook int4, and on no
            convolution. None leaves it in its own dtype.
        targets, exclude, layers, layers_pattern: as of :class:`LoRA`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message begins with its name.

    Reference:
        Choukroun et al. 2019, "Low-bit Quantization of Neural Networks for Efficient Inference";
        Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
    """

    method: Literal["rtn", "hqq"] = "rtn"
    group_size: int = 64
    codebook: Literal["int4", "nf4", "fp4"] = "int4"
    symmetric: bool = False
    grid: int = 20
    round_zero: bool = False
    iterations: int = 20
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    activations: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("method", _METHODS),
            ("codebook", CODEBOOKS),
            ("scale_dtype", _SCALE_DTYPES),
            ("activations", (None, *ACTIVATIONS)),
        ):
            if getattr(self, name) not in known:
                _reject(name, " or ".join(map(repr, known)), getattr(self, name))
        for name, least in (("group_size", -1), ("grid", 1), ("iterations", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                _reject(name, "an integer", value, error=TypeError)
            if value < least or (name == "group_size" and value == 0):
                _reject(name, "-1 or at least 1" if least < 0 else f"at least {least}", value)
        for name in ("symmetric", "round_zero"):
            if not isinstance(getattr(self, name), bool):
                _reject(name, "True or False", getattr(self, name), error=TypeError)
        if self.method == "hqq" and self.codebook != "int4":
            _reject("codebook", "'int4' beside method='hqq'", self.codebook)
        if self.symmetric and (self.method == "hqq" or self.codebook != "int4"):
            _reject("symmetric", "False but beside method='rtn' and codebook='int4'", True)
        if self.round_zero and self.method != "hqq":
            _reject("round_zero", "False but beside method='hqq'", True)
        if self.activations is not None and self.codebook != "int4":
            _reject("activations", "None but beside codebook='int4'", self.activations)


@dataclass(frozen=True, kw_only=True)
class MaskedTuning(Targeted):
    r"""Trains some entries of the weights, chosen once over all of them; the rest keeps its bits.

    With :math:`w_i` an entry, d the density and P the number of entries of all targeted weights,

    .. math::
        S_{SAFT} = \operatorname*{top-}dP_i \; \Big| \sum_b
            \frac{\partial L_b}{\partial w_i} \Big|, \quad
        S_{SaRA} = \{i : |w_i| < t\} \; \text{or the} \; dP \; \text{smallest} \; |w_i|

    over the batches b of the calibration. On linear layers. SaRA's progressive choice and its loss
    are :class:`pyfastft.sparsity.SaRA`. A head that starts untrained has the largest gradients:
    exclude it, and let it train whole.

    Args:
        method: ``"saft"`` or ``"sara"``.
        density: d, in (0, 1]; of ``"saft"`` 0.001 by default.
        threshold: t of ``"sara"``, in place of a density; 0.002 by default.
        layout: what ``"saft"`` chooses: single entries (``"element"``), or by their mean score
            ``"rows"``, ``"columns"`` or ``"blocks"``, as many as fit the density.
        block: edge of a block.
        passes: how often ``"saft"`` reads the calibration. Each pass sums the gradients of a like
            share of the weights, in float32; what is chosen is the same for any number. A pass
            holds its sums and one gradient more.
        targets, exclude, layers, layers_pattern: as of :class:`LoRA`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message begins with its name.

    Reference:
        Nguyen et al. 2024, "SAFT: Towards Out-of-Distribution Generalization in Fine-Tuning",
        arXiv:2407.03036, section 3; Hu et al. 2024, "SaRA: High-Efficient Diffusion Model
        Fine-tuning with Progressive Sparse Low-Rank Adaptation", arXiv:2409.06633, section 4.
    """

    method: Literal["saft", "sara"] = "saft"
    density: float | None = None
    threshold: float | None = None
    layout: Literal["element", "rows", "columns", "blocks"] = "element"
    block: int = 32
    passes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("method", _TUNINGS), ("layout", _LAYOUTS)):
            if getattr(self, name) not in known:
                _reject(name, " or ".join(map(repr, known)), getattr(self, name))
        for name in ("block", "passes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                _reject(name, "an integer", value, error=TypeError)
            if value < 1:
                _reject(name, "at least 1", value)
        if self.method == "sara":
            self._expect_sara()
        elif self.threshold is not None:
            _reject("threshold", "no value but beside method='sara'", self.threshold)
        elif self.density is None:
            self._freeze("density", _SAFT_DENSITY)
        if self.density is not None:
            _expect_number("density", self.density)
            if not 0 < self.density <= 1:
                _reject("density", "a part of all entries, above 0", self.density)

    def _expect_sara(self) -> None:
        if self.density is None and self.threshold is None:
            self._freeze("threshold", _SARA_THRESHOLD)
        if self.layout != "element":
            _reject("layout", "'element' beside method='sara'", self.layout)
        if self.passes != 1:
            _reject("passes", "1 beside method='sara', which reads no calibration", self.passes)
        if self.threshold is not None:
            if self.density is not None:
                _reject("density", "no value beside a threshold", self.density)
            _expect_number("threshold", self.threshold)
            if self.threshold <= 0:
                _reject("threshold", "a magnitude above 0", self.threshold)


def _reject(name: str, what: str, got: object, *, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{name}: expected {what}, got {got!r}")


def _expect_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _reject(name, "a number", value, error=TypeError)
    if not abs(value) <= _FLOAT32_MAX:
        _reject(name, "a finite number of float32's range", value)


def _expect_rank(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _reject(name, "an integer", value, error=TypeError)
    if value < 1:
        _reject(name, "a rank of at least 1", value)


def _expect_regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{name}: expected a regular expression, got {value!r} ({error})"
        ) from None


def _names(name: str, value: object) -> str | tuple[str, ...]:
    """A string as it is, a collection of strings as a tuple; sets sorted, to be reproducible."""
    if isinstance(value, str):
        _expect_regex(name, value)
        return value
    if not isinstance(value, (list, tuple, set, frozenset)):
        _reject(name, "a string or a list of strings", value, error=TypeError)
    for item in value:
        if not isinstance(item, str):
            _reject(name, "a string or a list of strings", item, error=TypeError)
    if name == "layers_pattern":
        for item in value:
            _expect_regex(name, item)
    return tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)


def _layers(value: object) -> int | tuple[int, ...] | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, (list, tuple, range)):
        _reject("layers", "an integer or a list of integers", value, error=TypeError)
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int):
            _reject("layers", "an integer or a list of integers", item, error=TypeError)
    return tuple(value)


def _pattern(name: str, value: object, expect: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        _reject(name, "a mapping of names to numbers", value, error=TypeError)
    for key, number in value.items():
        if not isinstance(key, str):
            _reject(name, "names as keys", key, error=TypeError)
        _expect_regex(name, key)
        expect(f"{name}[{key!r}]", number)
    return dict(value)


def _pattern_key(patterns: Mapping[str, Any], name: str) -> str:
    """The first pattern that the end of the name matches; the name itself where none does."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), name)
