"""An algorithm of your own: a class with a loss, in your own file. Everything else is the base class's."""

from functools import partial

from lightning import seed_everything
from torch.optim import AdamW

from leyden.algos import SFT
from leyden.datamodules import InstructionData
from leyden.datamodules.sample import write_sample
from leyden.models import CausalLM
from leyden.trainer import Trainer


class FocalSFT(SFT):
    """Fine-tuning in which tokens count less, the surer the model is of them already: -(1 - p)^γ log p, as Lin et al.
    (2017) have it for images.

    Args:
        gamma: γ; 0 is SFT.
    """

    def __init__(self, *args, gamma: float = 2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma = gamma

    def loss(self, batch):
        # One log-probability for every token of the row, 0 where no response token stands. Means are written with the
        # batch's own methods: they divide by what the whole optimizer step holds, so the gradient does not depend on
        # how a step is cut into micro-batches or spread over devices.
        logp = self.policy(batch).logp
        hard = (1 - logp.exp()) ** self.gamma
        self.note("hard", batch.token_mean(hard.detach()))  # a column of metrics.csv, train/hard
        return batch.token_mean(-hard * logp)


if __name__ == "__main__":
    seed_everything(0)
    data = InstructionData(write_sample("chat.jsonl", "instruction", rows=600))
    algorithm = FocalSFT(CausalLM("tiny"), gamma=1.0, optimizer=partial(AdamW, lr=1e-3))
    Trainer("runs/focal", gradient_clip_val=1.0).fit(algorithm, data)

    # The command line finds the class in this folder too:
    #   leyden fit --config sft --model own_algorithm.FocalSFT --model.gamma 1 --data.path chat.jsonl
