"""Where the last turn of the user stands in a rendered prompt, of which the tokens alone are known."""

from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from orpo_trl.pairs.rendering import render_turns
from orpo_trl.pairs.row_errors import RowError
from orpo_trl.pairs.template_limits import TemplateLimit
from orpo_trl.pairs.tokenize import prompt_ids

# Words that no template holds.
_SYSTEM, _FIRST, _ANSWER, _SECOND = "zqsystem", "zqfirst", "zqanswer", "zqsecond"


@dataclass(frozen=True)
class TurnMarks:
    """How a chat template marks the last turn of the user.

    Attributes:
        header: what stands before each turn of the user.
        end: what stands behind the last one, where the answer follows.
    """

    header: str
    end: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TurnMarks | None":
        """The marks of a tokenizer's chat template, found by rendering conversations; None where it marks no turn.

        Texts are as the tokenizer decodes them, as those of `find` must be.
        """
        system, first, answer, second = (
            {"role": role, "content": words}
            for role, words in (("system", _SYSTEM), ("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND))
        )
        before, _, end = _rendered([first], tokenizer).partition(_FIRST)
        headers = [before, _between(_ANSWER, _SECOND, [first, answer, second], tokenizer)]
        # Some templates refuse a system turn, or put its words into the turn of the user.
        with_system = [*headers, _between(_SYSTEM, _FIRST, [system, first], tokenizer)]
        header = _common_end(with_system).lstrip() or _common_end(headers).lstrip()
        return cls(header, end) if header and end.strip() else None

    def find(self, prompt: str) -> tuple[int, int] | None:
        """Begin and end of the last turn of the user in a decoded prompt, in characters; None where there is none."""
        begin = prompt.rfind(self.header)
        if begin < 0:
            return None
        begin += len(self.header)
        end = prompt.find(self.end, begin)
        if end < 0:
            # The end of a prompt counts to the responses where it is rendered otherwise once they follow.
            kept = next((k for k in range(len(self.end), 0, -1) if prompt.endswith(self.end[:k])), 0)
            end = max(begin, len(prompt) - kept)
        return begin, end


def _rendered(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as the model sees it, decoded; empty where the template refuses these turns or there is none."""
    try:
        text = render_turns(turns, tokenizer, add_generation_prompt=True)
    except (RowError, ValueError, TemplateLimit):
        return ""
    return str(tokenizer.decode(prompt_ids([text], tokenizer)[0]))


def _between(left: str, right: str, turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands between the words of two turns; empty where the prompt holds not both."""
    found, mark, _ = _rendered(turns, tokenizer).rpartition(left)[2].partition(right)
    return found if mark else ""


def _common_end(texts: list[str]) -> str:
    """The longest text that all of them end with."""
    signs = zip(*(reversed(text) for text in texts), strict=False)
    length = sum(1 for _ in takewhile(lambda found: len(set(found)) == 1, signs))
    return texts[0][len(texts[0]) - length :]


def special_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the special tokens among token ids, each once, in their order."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    return [str(tokenizer.decode([number])) for number in dict.fromkeys(ids) if number in special]
