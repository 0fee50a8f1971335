"""The README's tables are those that the receipts give."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_tables_are_the_committed_ones():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- (\w+): from (\S+) -->\n(.*?)<!-- end of \1 -->", text, re.S)
    assert [name for name, _, _ in blocks] == ["table1", "fast", "mixup", "oal", "openood_mixup", "openood_oal"]
    for _, place, block in blocks:
        made = (ROOT / place).read_text(encoding="utf-8").split("<!-- recipe")[0]
        assert block.strip() == made.strip(), f"copy the table of {place} into README.md"


def test_its_pictures_and_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for place in re.findall(r"\]\(([^)#]+)\)", text):
        assert place.startswith("http") or (ROOT / place).exists(), place
