"""What a simulator's process gets of this machine: a folder of its own, and nothing secret."""

import os
import tempfile

from support.run_folder import SetupError, one_line

# what a java or a python needs of our environment; keys and passwords are in the rest
NEEDED = """PATH HOME TMPDIR TZ LANG LANGUAGE LD_LIBRARY_PATH NIX_LD NIX_LD_LIBRARY_PATH
    JAVA_HOME JAVA_TOOL_OPTIONS JDK_JAVA_OPTIONS _JAVA_OPTIONS OMP_NUM_THREADS PYTHONPATH PYTHONHOME
    PYTHONHASHSEED PYTHONUTF8 PYTHONUSERBASE PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX""".split()


def environment():
    needed = lambda name: name in NEEDED or name.startswith(("LC_", "DYLD_"))
    return {name: value for name, value in os.environ.items() if needed(name)}


def folder():
    """A new folder that other users cannot enter: its `name`, its cleanup(). Raises SetupError."""
    try:
        return tempfile.TemporaryDirectory(prefix="simulator-", ignore_cleanup_errors=True)
    except OSError as error:
        raise SetupError(f"no folder for a simulator ({one_line(error)}); set TMPDIR") from error
