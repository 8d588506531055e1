"""Find stop strings in text that arrives in pieces. Knows nothing of tokens.

The cut is where the first stop string becomes complete, so it does not depend on how the text was
cut into pieces. Text that could still become a stop string is held back.
"""

from collections.abc import Sequence


class _Matcher:
    """Progress of one pattern through a text, a character at a time.

    Source: Knuth, Morris, Pratt 1977, "Fast pattern matching in strings".
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.num_matched = 0
        self._fallback = _fallback_lengths(pattern)

    def advance(self, char: str) -> bool:
        """Take one character; return whether the pattern is now complete."""
        while self.num_matched and self.pattern[self.num_matched] != char:
            self.num_matched = self._fallback[self.num_matched - 1]
        if self.pattern[self.num_matched] == char:
            self.num_matched += 1
        return self.num_matched == len(self.pattern)


def _fallback_lengths(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    lengths = [0] * len(pattern)
    matched = 0
    for place in range(1, len(pattern)):
        while matched and pattern[matched] != pattern[place]:
            matched = lengths[matched - 1]
        matched += pattern[matched] == pattern[place]
        lengths[place] = matched
    return lengths


class StopStringFilter:
    """Pass text through until a stop string is complete.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._matchers = [_Matcher(pattern) for pattern in stop if pattern]
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return the text that can be shown now. After a match: nothing more."""
        if self.matched is not None:
            return ""
        if not self._matchers:
            return text
        buffer = self._held + text
        for place in range(len(self._held), len(buffer)):
            if self._is_complete_at(buffer[place]):
                self._held = ""
                return buffer[: place + 1 - len(self.matched or "")]
        return self._release(buffer)

    def flush(self) -> str:
        """Return what was held back; the text is over."""
        held, self._held = self._held, ""
        return held

    def _is_complete_at(self, char: str) -> bool:
        complete = [matcher.pattern for matcher in self._matchers if matcher.advance(char)]
        if complete:
            self.matched = max(complete, key=len)
        return bool(complete)

    def _release(self, buffer: str) -> str:
        num_held = max(matcher.num_matched for matcher in self._matchers)
        cut = len(buffer) - num_held
        self._held = buffer[cut:]
        return buffer[:cut]
