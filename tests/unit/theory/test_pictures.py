"""Every example is listed, and drawn in the README."""

from pathlib import Path

from examples.theory import run_all

FOLDER = Path(run_all.__file__).parent


def test_all_examples_are_run_and_in_the_readme():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"run_all", "report", "tabular"}
    assert {example.__name__.rsplit(".", 1)[-1] for example in run_all.EXAMPLES} == scripts
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in scripts:
        assert f"({name}.py)" in readme
        assert f"(figures/{name}.png)" in readme
        assert 0 < (FOLDER / "figures" / f"{name}.png").stat().st_size < 60_000
