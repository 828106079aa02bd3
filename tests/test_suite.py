"""The suite itself."""

import re


def test_ids_are_plain_words(request):
    """An id that holds a clock, an address or bytes differs between processes, and pytest-xdist refuses to start."""
    names = [item.name for item in request.session.items]
    plain = re.compile(r"\w+(\[[A-Za-z0-9._-]{1,160}\])?")
    assert len(names) > 0
    assert [name for name in names if not plain.fullmatch(name)] == []
