"""The contract suite as another distribution uses it: from its entry point to its tests, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from third_party_package import write_package

ROOT = Path(__file__).resolve().parents[2]

# Some of each contract by the package's own test module, and two by the suite that --pyargs collects.
CHOSEN = (
    "test_demo and (test_01_resume and batch or test_04 or test_08 and (manual or dict) or test_09 or test_11)",
    "test_demo and halving and (test_02 or test_03 or test_05 and fp32)",
    "test_demo and test_10_company and (halving-ema or simulated-halving)",
    "test_demo and test_03 and forgetful",
    "test_installed and test_09",
    # A test of the package that is none of the contracts, run after them.
    "test_further",
)


def run(folder: Path) -> tuple[dict[str, Any], str]:
    """Return what the contracts found for the package's methods, and what pytest printed; by one of pytest-xdist."""
    path = os.pathsep.join([str(write_package(folder)), str(ROOT)])
    options = ["-n", "1", "--capabilities", "found.json", "-k", " or ".join(f"({each})" for each in CHOSEN)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--pyargs", "tests", "lightning_stable.testing"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed
    return json.loads((folder / "found.json").read_text()), printed


def findings(found: dict[str, Any], method: str) -> dict[str, str]:
    return {name: contract["finding"] for name, contract in found["methods"][method]["contracts"].items()}


# One test: what it looks at takes two interpreters and a pair of processes.
def test_a_method_that_keeps_the_contracts_passes_and_one_that_breaks_some_fails_in_these(tmp_path: Path) -> None:
    found, printed = run(tmp_path)

    kept = ("resume", "yaml", "inert", "two processes", "oracle", "any module", "safe load", "company", "card")
    assert findings(found, "halving") == dict.fromkeys(kept, "passed"), printed
    halving = found["methods"]["halving"]["contracts"]
    assert halving["any module"]["cases"] == {"dict": "passed", "manual": "refused"}
    assert halving["any module"]["reasons"] == {"manual": "does not work with manual"}
    assert halving["company"]["cases"] == {"ema": "passed", "simulated": "passed"}

    kept = ("two processes", "any module", "safe load")
    broken = {"resume": "failed", "inert": "expected failure", "card": "failed"}
    assert findings(found, "forgetful") == {**dict.fromkeys(kept, "passed"), **broken}, printed
    assert found["methods"]["forgetful"]["contracts"]["inert"]["reasons"] == {"all": "It is a test of the contracts."}
    assert "resumed run against uninterrupted run" in printed
    assert "forgetful.md does not exist" in printed

    # Of our own methods, which were in company alone, there is nothing.
    assert found["methods"].keys() == {"halving", "forgetful"}
    assert {"python", "torch", "lightning"} <= found["versions"].keys()
    assert "capabilities of 2 methods are in" in printed
    # 15 of the test module, the further test, and test_09 once more for each method: by --pyargs, from the settings
    # that the ini names.
    assert "2 failed, 18 passed, 1 xfailed" in printed
