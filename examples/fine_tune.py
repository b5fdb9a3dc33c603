"""Fine-tune a model on questions and answers: a policy, data, an algorithm and a Trainer are all that there is."""

from functools import partial

from lightning import seed_everything
from torch.optim import AdamW

from leyden.algos import SFT
from leyden.datamodules import InstructionData
from leyden.datamodules.sample import write_sample
from leyden.models import CausalLM
from leyden.policy import Sampling
from leyden.trainer import Trainer

seed_everything(0)

# 600 generated questions with answers. A file of your own, JSONL, CSV or Parquet, is named in the same place.
data = InstructionData(write_sample("chat.jsonl", "instruction", rows=600))

# `tiny` is the model that comes with Leyden; any hub name or model folder stands in its place. Weights arrive when
# training begins. The learning rate is the toy's: leave it out for a real model.
policy = CausalLM("tiny")
algorithm = SFT(policy, optimizer=partial(AdamW, lr=1e-3))

# The folder gets metrics.csv, checkpoints/ and export/, an ordinary model folder for transformers.
Trainer("runs/fine-tuned", max_epochs=2, gradient_clip_val=1.0).fit(algorithm, data)

# A policy takes and gives token ids; the chat template of its tokenizer makes them of a conversation.
question = [{"role": "user", "content": "3 더하기 4는 얼마예요?"}]
prompt = policy.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
[[answer]] = policy.generate([prompt], sampling=Sampling(max_new_tokens=32, temperature=0.0))
print(question[0]["content"], "→", answer.text)
