"""The README's table is the one that the receipts give."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_is_the_committed_one():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- table1: from (\S+) -->\n(.*?)<!-- end of table1 -->", text, re.S)
    made = (ROOT / block[1]).read_text(encoding="utf-8").split("<!-- recipe")[0]
    assert block[2].strip() == made.strip(), f"copy the table of {block[1]} into README.md"


def test_its_pictures_and_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for place in re.findall(r"\]\(([^)#]+)\)", text):
        assert place.startswith("http") or (ROOT / place).exists(), place
