"""What a reward is: a function of sampled responses, asked by `score`, which trusts nothing that it is told."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from leyden.errors import UserError
from leyden.example import Sample
from leyden.policy.policy import Policy

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Reward(ABC):
    """Scores samples. Called with N samples, it returns N finite numbers, higher for better: a float32 tensor [N].

    Derive a class from this one, or write any class with such a `__call__`, or a plain function: all count as rewards.
    A reward that is a module (`torch.nn.Module`) is moved to the device, never trained, and never in a checkpoint.
    """

    terms: Mapping[str, Tensor] = NOTHING
    """What the scores of the last call are made of, by name, [N] each: logged beside the reward itself."""

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> Tensor: ...

    def attach(self, policy: Policy) -> None:  # noqa: B027 — most rewards do not care
        """Learn of the policy whose responses will be scored, once it is built and before it is trained."""

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        """Whatever can be called is a reward, but not a class of classes: a class itself scores nothing."""
        if cls is not Reward or issubclass(other, type):
            return NotImplemented
        return True if any("__call__" in base.__dict__ for base in other.__mro__) else NotImplemented


def name_of(reward: Any) -> str:
    """What messages and metrics call a reward: its `name`, or that of its function or class."""
    name = getattr(reward, "name", None)
    return name if isinstance(name, str) else str(getattr(reward, "__name__", type(reward).__name__))


def attach(reward: Any, policy: Policy) -> None:
    """Tell a reward of the policy, if it wants to know."""
    if (told := getattr(reward, "attach", None)) is not None:
        told(policy)


def score(reward: Callable[[Sequence[Sample]], Any], samples: Sequence[Sample]) -> Tensor:
    """Ask a reward for the scores of N samples and check them: [N] float32 on the CPU.

    Sequences of numbers and arrays are taken like tensors.

    Raises:
        UserError: it raised an error, or gave something else than N finite numbers; the message names the reward, the
            row where one is to blame, and what to do.
    """
    if not samples:
        return torch.zeros(0)
    try:
        found = _ask(reward, samples)
    except UserError:
        raise
    except Exception as error:
        raise _failure(reward, samples, error) from error
    scores = _numbers(reward, found, samples)
    for place in (~torch.isfinite(scores)).nonzero()[:1, 0].tolist():
        raise UserError(f"{at(samples[place])}: {name_of(reward)} gave {scores[place]:g}; give every response a number")
    return scores


def _ask(reward: Callable[[Sequence[Sample]], Any], samples: Sequence[Sample]) -> Any:
    """What it returns; a generator has done its work only when it has been read."""
    found = reward(samples)
    return list(found) if isinstance(found, Iterator) else found


def at(sample: Sample) -> str:
    """`file:line (response '…')` of a sample, for messages."""
    said = " ".join(sample.response.split())
    said = said if len(said) <= 60 else said[:59] + "…"
    return f"{sample.source or 'a row'} (response {said!r})"


def _numbers(reward: Any, found: Any, samples: Sequence[Sample]) -> Tensor:
    """What a reward returned as [N] float32."""
    n, name = len(samples), name_of(reward)
    if isinstance(found, Iterable) and not isinstance(found, Tensor | str | bytes | Mapping | Set):
        found = found if hasattr(found, "__array__") else _floats(name, list(found), samples)
    try:
        scores = torch.as_tensor(found).detach()
    except (TypeError, ValueError, RuntimeError):
        scores = torch.zeros(())  # no tensor of numbers
    if scores.shape != (n,):
        got = f"shape {list(scores.shape)}" if scores.ndim else type(found).__name__
        raise UserError(f"{name} gave {got} for {n} samples; return one number for each, in their order")
    if scores.is_complex():
        raise UserError(f"{name} gave complex numbers; return real ones")
    return scores.to("cpu", torch.float32)


def _floats(name: str, found: list[Any], samples: Sequence[Sample]) -> list[float]:
    """The numbers of a list, as long as the samples."""
    if len(found) != len(samples):
        raise UserError(
            f"{name} gave {len(found)} scores for {len(samples)} samples; return one number for each, in their order"
        )
    numbers = []
    for value, sample in zip(found, samples, strict=True):
        try:
            if isinstance(value, str):
                raise TypeError
            numbers.append(float(value))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(f"{at(sample)}: {name} gave {value!r:.40}, not a number; give it a number") from None
    return numbers


def _failure(reward: Any, samples: Sequence[Sample], error: Exception) -> UserError:
    """The error of a reward as one line: what went wrong, in which line of its code, and at which row."""
    guilty = next((sample for sample in samples if _raises(reward, sample)), None) if len(samples) > 1 else samples[0]
    first, last = samples[0].source, samples[-1].source
    row = at(guilty) if guilty is not None else f"{len(samples)} samples from {first or 'a row'} to {last or 'another'}"
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    here = [frame for frame in lines if Path.cwd() in Path(frame.filename).parents]
    own = [frame for frame in here if "site-packages" not in frame.filename] or lines
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    said = (str(error).strip().splitlines() or [""])[0]
    problem = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return UserError(f"{row}: {name_of(reward)} failed with {problem}{place}; mend the reward or the row")


def _raises(reward: Any, sample: Sample) -> bool:
    """Whether a sample makes a reward fail by itself."""
    try:
        _ask(reward, [sample])
    except Exception:
        return True
    return False
