"""A linter that looks at nothing passes. This fails unless each tool saw the files it is there for."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def main() -> int:
    sources = [p for p in ROOT.glob("*/**/*.py") if p.relative_to(ROOT).parts[0] not in ("swath", ".venv", "build", "out")]
    ruff = subprocess.run([BIN / "ruff", "check", "--show-files", "."], cwd=ROOT, capture_output=True, text=True, check=True)
    types = subprocess.run([BIN / "basedpyright", "--outputjson"], cwd=ROOT, capture_output=True, text=True, check=False)
    imports = subprocess.run([BIN / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False)
    seen = {
        "ruff": sum(line.endswith(".py") for line in ruff.stdout.splitlines()),
        "basedpyright": json.loads(types.stdout)["summary"]["filesAnalyzed"],
        "import-linter": int(imports.stdout.split("Analyzed ")[1].split()[0]),
    }
    # templates travel with an export and are modules only there
    outside = ("tests", "benchmarks")
    in_package = sum(p.relative_to(ROOT).parts[0] not in outside and p.parent.name != "templates" for p in sources)
    wanted = {"ruff": len(sources), "basedpyright": len(sources), "import-linter": in_package}
    short = [f"{tool} saw {seen[tool]} files of {wanted[tool]}" for tool in seen if seen[tool] < wanted[tool]]
    print("\n".join(short) or f"tools saw their files: {seen}", file=sys.stderr)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
