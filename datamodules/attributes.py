"""Labelled answers: numbers of named attributes, or a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leyden.batch.forest import Tree
from leyden.datamodules.file_data import StoredRows
from leyden.datamodules.formats.preference_readers import finite
from leyden.datamodules.formats.row_error import RowError
from leyden.errors import UserError, nearest
from leyden.example import Example
from leyden.policy.policy import class_name


class AttributeData(StoredRows):
    """Rows of a prompt and an answer with a column for each attribute, such as HelpSteer's `prompt, response,
    helpfulness, correctness, coherence, complexity, verbosity`. A row with several answers has lists in these columns.

    Nothing is compared, so answers that score the same are all kept. Each answer stands beside a prompt of its own.
    Rows with the same prompt are held out together.

    Args:
        attributes: columns whose numbers are learnt; their order is that of the outputs.
        classes: values of the one attribute where it names a class instead; their order is that of the outputs.
    """

    kind = "candidates"

    def __init__(
        self, *args: Any, attributes: list[str], classes: list[bool | int | str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if not attributes or len(set(attributes)) < len(attributes):
            raise UserError(f"--data.attributes {attributes}: name the columns that are learnt, each once")
        if classes is not None and len(attributes) > 1:
            raise UserError(
                f"--data.classes {classes}: values of one attribute, and there are {len(attributes)}; leave it out "
                "where attributes are numbers"
            )
        named = None if classes is None else [class_name(one) for one in classes]
        if named is not None and (len(named) < 2 or len(set(named)) < len(named)):
            raise UserError(f"--data.classes {classes}: give two or more values of {attributes[0]}, each once")
        self.attributes, self.classes = attributes, named

    @property
    def columns_read(self) -> frozenset[str]:
        return frozenset(self.attributes)

    def encode(self, example: Example) -> list[Tree]:
        whole, trees = self.template.encode(example), []
        for number, response in enumerate(whole.responses):
            scores = [self._label(example, name, number) for name in self.attributes]
            weights = None if whole.weights is None else [whole.weights[number]]
            trees.append(Tree(whole.prompt, [response], scores, weights))
        return trees

    def _label(self, example: Example, name: str, number: int) -> float:
        """The label of one answer: a number, or the number of its class."""
        if name not in example.row:
            raise RowError(f"no column '{name}'{nearest(name, example.row)}; give it or drop the row", "no label")
        value, answers = example.row[name], len(example.responses)
        if isinstance(value, list):
            if len(value) != answers:
                problem = f"'{name}' has {len(value)} values for {answers} answers; give each its own"
                raise RowError(problem, "labels missing")
            value = value[number]
        elif answers > 1:
            raise RowError(f"'{name}' is one value for {answers} answers; give a list with one each", "labels missing")
        if self.classes is None:
            return finite(value, name)
        if (named := class_name(value)) not in self.classes:
            known = f"{', '.join(self.classes[:-1])} and {self.classes[-1]}"
            raise RowError(
                f"'{name}' is {value!r:.40}, and the classes are {known}; mend it or drop the row", "no class"
            )
        return float(self.classes.index(named))

    def labels(self, rows: Sequence[int]) -> Tensor:
        """[R, K] labels of the answers of these rows; of a class its number."""
        found = [self.tree(row).scores for row in rows]
        return torch.tensor(found, dtype=torch.float32).reshape(len(rows), len(self.attributes))

    def places(self, rows: list[tuple[int, int]]) -> list[Any]:
        prompts = [store.prompts() for store in self._stores]
        return [prompts[store][row] for store, row in rows]
