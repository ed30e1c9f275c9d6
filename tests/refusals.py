"""What a refusal must say."""

import pytest

from pipeline.errors import ModelError


def refuse(words: str, function, *args, **kwargs) -> str:
    """The one-line message of the ModelError that `function` raises."""
    with pytest.raises(ModelError, match=words) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    assert "got" in message
    return message
