"""Chat templates that behave like the templates of well-known model families."""

# ruff: noqa: E501

from typing import Any

_PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
_CALLS = (
    "{%- for c in m.tool_calls or [] %}{{- '<call>' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson)"
    " + '</call>' }}{%- endfor %}"
)
_TOOLS = "{%- if tools %}{{- '<|im_start|>system\\nTOOLS ' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}"
_MARKED = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}OPEN{{- m.content }}"
    "{{- '<|im_end|>' }}CLOSE{{- '\\n' }}{%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}" + _PROMPT
)
CHATML = (
    _TOOLS + "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}" + _CALLS
    + "{{- '<|im_end|>\\n' }}{%- endfor %}" + _PROMPT
)  # fmt: skip
#: EOS ends an answer. User and assistant messages must alternate. The ids of tool calls must have nine characters.
MISTRAL = (
    "{{- bos_token }}{%- set ns = namespace(n=0) %}{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}{%- if (m.role == 'user') != (ns.n % 2 == 0) %}"
    "{{- raise_exception('user and assistant must take turns') }}{%- endif %}{%- set ns.n = ns.n + 1 %}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}{%- elif m.tool_calls %}{{- '[CALLS] [' }}"
    "{%- for c in m.tool_calls %}{%- if c.id is not defined or c.id | length != 9 %}"
    "{{- raise_exception('the id of a call has nine letters') }}{%- endif %}"
    "{{- {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[RESULT] ' + ({'content': m.content, 'call_id': m.tool_call_id} | tojson) + '[/RESULT]' }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}"
    "{%- else %}{{- raise_exception('only user, assistant and tool') }}{%- endif %}{%- endfor %}"
)
#: Reads reasoning from `reasoning_content` or from the content, and writes it only in answers after the last user message.
THINK = (
    _TOOLS + "{%- set ns = namespace(q=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.q = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set r = '' %}"
    "{%- set said = m.content or '' %}{%- if m.reasoning_content is string %}{%- set r = m.reasoning_content %}"
    "{%- elif '</think>' in said %}{%- set r = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.q and (loop.last or r) %}{{- '<think>\\n' + r + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- said.lstrip('\\n') }}" + _CALLS + "{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}" + _PROMPT
)  # fmt: skip
#: The generation prompt opens the reasoning with `<think>`. The template removes the reasoning of all assistant messages.
DROPTHINK = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<A>' + m.content.split('</think>')[-1] + eos_token }}{%- else %}{{- '<U>' + m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<A><think>\\n' }}{%- endif %}"
)
GEMMA = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('no system message') }}{%- endif %}"
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('no turns') }}{%- endif %}"
    "{{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (m.content | trim) + '<end>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<turn>model\\n' }}{%- endif %}"
)
#: Each header ends with a space. The tokenizer would merge this space with the first word of the answer.
SPACE = (
    "{%- for m in messages %}{{- ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content "
    "+ ('\\n' if m.role == 'user' else eos_token + '\\n') }}{%- endfor %}{%- if add_generation_prompt %}{{- 'ASSISTANT: ' }}"
    "{%- endif %}"
)
#: Each header ends with two newlines. The tokenizer merges them into one token if no text follows.
LLAMA3 = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n\\n' + m.content | trim + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"
)
#: An answer ends with the role token of the next message.
GLM = (
    "{{- '[g]' }}{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)
#: Messages are separated by ordinary text only, without special tokens.
WORDS = (
    "{%- for m in messages %}{{- '### ' + m.role + ':\\n' + m.content + '\\n\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '### assistant:\\n' }}{%- endif %}"
)
MARKS = _MARKED.replace("OPEN", "{% generation %}").replace("CLOSE", "{% endgeneration %}")
MARKS_TIGHT = _MARKED.replace("OPEN", "{%-generation-%}").replace("CLOSE", "{%-endgeneration-%}")
MARKS_WITHOUT_END = MARKS.replace("{{- '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{- '<|im_end|>' }}")
MARKS_NOTHING = MARKS.replace("m.role == 'assistant'", "m.role == 'assistant' and m.reasoning_content")
#: For each family: the template, the special tokens that the template needs, and the token that ends an answer.
FAMILIES: dict[str, tuple[Any, list[str], str]] = {
    "chatml": (CHATML, [], "<|im_end|>"),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]", "[CALLS]", "[RESULT]", "[/RESULT]"], "</s>"),
    "think": (THINK, [], "<|im_end|>"),
    "gemma": (GEMMA, ["<s>", "</s>", "<turn>", "<end>"], "<end>"),
    "space": (SPACE, ["</s>"], "</s>"),
    "llama3": (LLAMA3, [], "<|im_end|>"),
    "glm": (GLM, ["[g]", "<|user|>", "<|assistant|>", "<|system|>"], "<|user|>"),
    "words": (WORDS, ["</s>"], "</s>"),
    "marks": (MARKS, [], "<|im_end|>"),
    "marks-tight": (MARKS_TIGHT, [], "<|im_end|>"),
    "marks-without-end": (MARKS_WITHOUT_END, [], "<|im_end|>"),
    "named": ({"default": CHATML, "tool_use": CHATML}, [], "<|im_end|>"),
    "none": (None, ["<s>"], "<|im_end|>"),
}


def set_family(tokenizer: Any, name: str) -> str:
    """Set a family's template and special tokens in a tokenizer; return the token that ends an answer."""
    template, tokens, end = FAMILIES[name]
    named = {"bos_token": "<s>"} if "<s>" in tokens else {}
    # The token that ends an answer is the tokenizer's EOS only in some families.
    eos = "</s>" if "</s>" in tokens else "<|endoftext|>"
    tokenizer.add_special_tokens({**named, "eos_token": eos, "additional_special_tokens": tokens})
    tokenizer.chat_template = template
    return end
