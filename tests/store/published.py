"""What the tests of remotes and of copies read: tests/store/conftest.py serves it."""

from store.download import Retry

HOOKS = ("blocks.2.hook_resid_post", "blocks.7.hook_resid_post")
ACTS = f"{HOOKS[1]}/acts/c/0/0"
FAST = Retry(attempts=3, first_s=0.0)
