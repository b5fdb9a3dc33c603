"""The recipe of the embedded model: the steps before and after its pretraining.

    leyden data sample --kind text --language both --rows 40000 --output corpus.jsonl
    python -m leyden.models.tiny_recipe corpus.jsonl BLANK    # a tokenizer and a freshly initialised Llama
    leyden fit --config pretrain --model.policy.path BLANK --data.path corpus.jsonl …
    python -m leyden.models.tiny_recipe TRAINED TINY          # the trained folder in bfloat16, as it ships

`models/tiny/README.md` has the exact settings and the figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from leyden.errors import UserError

VOCABULARY = 4096
LONGEST_TOKEN = 10
"""In bytes: three syllables with the space before them, so that no token contains a whole answer of several words."""
END, PAD, TURN, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYLLABLE_REPEATS = 3000
"""Number of times that each common syllable is added to the tokenizer's corpus: enough to outrank word pieces."""
IRREGULAR = (
    "같겠겪곳괜괴교규그글긋길깊깎깨꺼께꼬꼭꽃꽤꾸꿈끄끊끌끝낫났낮낳낼넘넣놓뇌눴늦닫닭답닿댓덮돕됐됩뒤듣딸땀때떠떡떤떨떻또똑뚝뛰뜨뜻띄"
    "랐럽렇렵롭료류릎릇맏맑맛맞맡맺먹멋몇묻뭘믿밑바밖받밝밟밥백뱃벌벗벚베볕볶봤봐붙빌빗빛빠빨빵뺄뻐뻔뽑뿌쁘삶살샀섞섭셨솟솥쉬쉽슷습싫싶싸싹쌍쌓썸써썼쏘쏟쑥쓰쓴쓸씀씨씩씻"
    "앉않앓앞얇얕얘얗얹없엇엉에엔엘엮였옆옳옷왔왕왜외왼욕용웃웠윗윙으읽잃입잇있잊잎짐집짓짜짝짧쪽쫓쯤찌찍찢찮찾채챙쳤촉춥춰췄층치친칠커컵켜켰콩쿠퀴크큰클키킨킬킴타탁탔탕태택터털텐텔템토톡톤통투트특튼"
    "틀티팀파팔패팬퍼편펴평폐포폭폰표푸푹풀품풍프플픈피필핏핑하학한할함합핫항해햇했행향허헌험헤헬혀현혈협형호혹혼홀홈화확환활황회획효후훈훌훨휴흐흔흘흙흥희흰히힌힘갔갖값갚걱걷겁겉겨겼끼넷눕늘렸덕덜돼둘뒷듯딱맘맨맥못뭐봉뿐삐샘섯셋숨숲싼썹쓱씹얼엄업었옛왠욱웬찬첫컴켓켤콘쿨"
)
"""Frequent syllables with a rarer initial, vowel or final consonant than the regular ones have."""


def syllables() -> list[str]:
    """Hangul syllables that get a token of their own: those of KS X 1001 with common letters, and frequent others."""
    vowels = [0, 1, 4, 5, 6, 8, 9, 13, 14, 16, 18, 20]
    initials = [0, 2, 3, 5, 6, 7, 9, 11, 12, 14, 17, 18]
    codes = product(initials, vowels, [0, 1, 4, 8, 16, 17, 21])
    regular = [chr(ord("가") + (initial * 21 + vowel) * 28 + end) for initial, vowel, end in codes]
    # KS X 1001, the 2,350 syllables in practical use, takes two bytes each; the codec spells out the others.
    return sorted({syllable for syllable in [*regular, *IRREGULAR] if len(syllable.encode("euc_kr")) == 2})


def texts(corpus: Path) -> Iterator[str]:
    """The `text` of every line of a JSONL file."""
    try:
        with corpus.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)["text"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    raise UserError(
                        f"{corpus}:{number}: not a row of text; make one with `leyden data sample --kind text`"
                    ) from None
    except FileNotFoundError:
        raise UserError(f"{corpus}: no such file; make one with `leyden data sample --kind text`") from None


def train_tokenizer(corpus: Path, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text survives a round trip; digits stand alone) with a ChatML template."""
    bpe = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD, TURN, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )

    def shown() -> Iterator[str]:
        yield from texts(corpus)
        for syllable in syllables():
            yield from [syllable] * SYLLABLE_REPEATS

    bpe.train_from_iterator(shown(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN, TURN_END],
        model_max_length=1024,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def blank_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A randomly initialised Llama of three million parameters; generation stops at the end of a document or a turn."""
    torch.manual_seed(seed)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in (END, TURN_END)]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=6,
        intermediate_size=512,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=stops[0],
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=config.pad_token_id)
    return model


def start(corpus: Path, out: Path) -> None:
    """Write the untrained model and the tokenizer made from `corpus` into the folder `out`."""
    tokenizer = train_tokenizer(corpus)
    model = blank_model(tokenizer)
    model.save_pretrained(out)
    _save_tokenizer(tokenizer, out)
    print(f"{out}: {len(tokenizer)} tokens, {model.num_parameters():,} parameters, not trained yet")


def finish(trained: Path, out: Path) -> None:
    """Write the model in the folder `trained` in bfloat16, which halves its size, into the folder `out`."""
    model = LlamaForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    model.save_pretrained(out)
    _save_tokenizer(PreTrainedTokenizerFast.from_pretrained(trained), out)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {model.num_parameters():,} parameters in bfloat16, {size / 2**20:.1f} MiB")


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save the tokenizer under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Start from a corpus file or finish a trained folder.

    Args:
        arguments: two paths: the corpus file or trained folder, and the folder to write.
    """
    if len(arguments) != 2:
        raise UserError(
            "recipe: expected two arguments; type `python -m leyden.models.tiny_recipe corpus.jsonl FOLDER`"
        )
    source, out = map(Path, arguments)
    (finish if source.is_dir() else start)(source, out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
