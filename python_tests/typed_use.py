"""What mypy must know of the package: `./lint` checks this file, whose errors are expected where it says so."""
# mypy: warn-unused-ignores

from typing_extensions import assert_type

import klflow_ext
from klflow_ext import LogitPath, Sampler, Trainer

path = LogitPath(50)
assert_type(path.vocab_size, int)
assert_type(klflow_ext.ExactDenoiser.__name__, str)
assert_type(Trainer.MOST_SKIPPED, int)
Sampler(3, path)  # type: ignore[arg-type]
LogitPath("fifty")  # type: ignore[arg-type]
klflow_ext.Smapler  # type: ignore[attr-defined]  # noqa: B018
