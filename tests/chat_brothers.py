"""Short chat templates in the manner of those that well-known families of models ship with: what each does to a
conversation, and not their words."""

from __future__ import annotations

_ASKED = "{% if add_generation_prompt %}"
_CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_CHATML_ASKED = _ASKED + "<|im_start|>assistant\n{% endif %}"
_THOUGHTS = (  # reasoning from its key, or from the content before </think>
    "{% set said = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
_CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
)
LLAMA2 = (  # the system prompt inside the first user turn, blanks around answers, EOS and BOS between turns
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set ms = messages[1:] %}{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}"
    "{% for m in ms %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ s if loop.first else '' }}{{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}"
    "<|im_start|>system\n\nToday Date: {{ date_string }}\n\n{{ s }}<|im_end|>"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
GEMMA3 = (  # the system prompt inside the first user turn
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set ms = messages[1:] %}{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}"
    "{% for m in ms %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ s if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # the system prompt inside the last user turn: the prompt of an earlier answer is none of the whole
    "{{ bos_token }}{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if s else messages) %}{% if m.role == 'user' %}[INST] "
    "{{ s + '\n\n' if s and loop.index >= loop.length - 1 else '' }}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
QWEN25 = (  # a system prompt of its own, tools in it, answers of tools as a user's
    "{% if tools %}<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' else 'You help.' }}\n"
    "<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% elif not (tools and loop.first and m.role == 'system') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}" + _CALLS + "<|im_end|>\n{% endif %}{% endfor %}" + _CHATML_ASKED
)
QWEN3 = (  # reasoning in the turns after the last user turn only; an argument that answers for it
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' and not "
    "(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}" + _THOUGHTS + "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ said.lstrip('\n') }}{% else %}{{ said }}{% endif %}"
    + _CALLS
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (  # system first and bare, reasoning cut from every turn, and opened by the generation prompt
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<start_of_turn>{{ m.content }}"
    "{% else %}<|im_start|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)
V3 = R1.replace("<think>\n{% endif %}", "{% endif %}")
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + _ASKED
    + ("<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    + _ASKED
    + ("<|im_start|>assistant<|im_sep|>{% endif %}")
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    + _ASKED
    + ("<|assistant|>\n{% endif %}")
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn><|{{ m.role | upper }}_TOKEN|>{{ m.content.strip() }}"
    "<end_of_turn>{% endfor %}" + _ASKED + "<start_of_turn><|ASSISTANT_TOKEN|>{% endif %}"
)
EXAONE = (  # a user turn is closed by a line end alone
    "{% for m in messages %}[|{{ m.role }}|]{{ m.content }}{{ '\n' if m.role == 'user' else '<|im_end|>\n' }}"
    "{% endfor %}" + _ASKED + "[|assistant|]{% endif %}"
)
HYPERCLOVA = (
    "{% for m in messages %}"
    + _CHATML_TURN.replace("<|im_end|>", "<|im_end|><|endofturn|>")
    + ("{% endfor %}" + _CHATML_ASKED)
)
HARMONY = (  # a channel before every text, another token after the last answer than after earlier ones
    "{% for m in messages %}<|im_start|>{{ m.role }}<|channel|>final<|message|>{{ m.content }}"
    "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    + _ASKED
    + "<|im_start|>assistant<|channel|>final<|message|>{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}"
    "USER: {{ m.content }} {% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>\n{% endif %}{% endfor %}"
    + _ASKED
    + "ASSISTANT: {% endif %}"
)
LAST_ONLY = (
    "<|im_start|>{{ messages[-2].content if messages | length > 1 else '' }}{{ messages[-1].content }}<|im_end|>"
)
GRANITE = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}<end_of_turn>{{ m.content }}</s>\n{% endfor %}"
    + _ASKED
    + ("<start_of_turn>assistant<end_of_turn>{% endif %}")
)
CHATML = "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_ASKED
EXACT = {
    "llama2": ("", " </s>"),
    "llama3": ("", "<|im_end|>"),
    "gemma3": ("", "<end_of_turn>"),
    "qwen25": ("", "<|im_end|>"),
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "v3": ("", "</s>"),
    "phi3": ("", "<|im_end|>"),
    "phi4": ("", "<|im_end|>"),
    "zephyr": ("", "</s>"),
    "command_r": ("", "<end_of_turn>"),
    "exaone": ("", "<|im_end|>"),
    "hyperclova": ("", "<|im_end|>"),
    "vicuna": ("", "</s>"),
    "granite": ("", "</s>"),
    "chatml": ("", "<|im_end|>"),
    "harmony": ("", "</s>"),
}
"""Template -> what it writes before the last answer that is trained with it, and the end of that answer."""
