"""What a text has so far: against counting it again."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab.generation.seen import Seen

TOKENS = st.lists(st.integers(0, 9), max_size=12)


@given(prompt=TOKENS, said=TOKENS, draft=TOKENS)
def test_it_counts_what_was_generated_and_knows_what_was_read(
    prompt: list[int], said: list[int], draft: list[int]
) -> None:
    seen = Seen(prompt)
    for token_id in said:
        seen.add(token_id)
    longer = seen.extended(draft)
    for text, generated in ((seen, said), (longer, said + draft)):
        ids, times = text.tensors(torch.device("cpu"))
        counts = Counter(generated)
        assert dict(zip(ids.tolist(), times.tolist(), strict=True)) == {t: counts[t] for t in {*prompt, *generated}}
    assert longer.times is not seen.times


def test_nothing_has_been_seen_of_an_empty_text() -> None:
    ids, times = Seen([]).tensors(torch.device("cpu"))
    assert ids.tolist() == times.tolist() == [] and ids.dtype == torch.int64
