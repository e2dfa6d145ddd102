"""Why a row of a table makes no question, and how that is mended."""

from typing import Any, get_args

from video_r1.settings.shared import ProblemType

REMEDIES = {
    "unreadable row": "correct the row in the file; in CSV, quote cells that hold the delimiter",
    "no question": "name the column of the questions: --columns problem=COLUMN, or fill in the cell",
    "no answer": "name the column of the answers: --columns answer=COLUMN, or fill in the cell",
    "no clip named": "name the column of the files: --columns path=COLUMN, or fill in the cell",
    "no such clip": "put the file below --media_root, or correct its name in the table",
    "several clips": "write so many of the file's folders in the table that one file is left",
    "clip elsewhere": "name its folder with --allowed_roots, or move it; addresses need --allow_urls",
    "options": "give two to 26 different options: a list, or a column for each (--columns options=a0+a1+a2)",
    "answer is no option": "answer with an option's letter, text or place (--answers from_0 or from_1)",
    "problem type": f"say --problem_type, or one of {', '.join(get_args(ProblemType))}",
    "no place or time": "write JSON as docs/data-format.md shows it for the problem type",
    "times": "write start and end in seconds or as h:mm:ss",
    "several media": "a question shows images or videos, not both: leave those of one kind out",
    "several questions": "write one row for each question",
    "media inside the table": "name the one column that holds a file a cell (--columns path=COLUMN) of a "
    "Parquet file or a data set of the hub, whose cells are read where they lie; or write the files out "
    "(datasets: cast_column(NAME, Video(decode=False)), then row[NAME]['bytes']) and name them in a column: "
    "--columns path=COLUMN",
    "subtitles": "convert them to .srt or .vtt in UTF-8",
    "media": "fetch the file again or encode it anew (ffmpeg -i OLD NEW.mp4), or leave the row out",
    "no manifest row": "correct what it says in the table; docs/data-format.md has what each field must be",
}
"""By reason. What was found stands beside it."""


class Refused(Exception):
    """A row that makes no question. reason: a key of REMEDIES; found: what stands there."""

    def __init__(self, reason: str, found: str) -> None:
        assert reason in REMEDIES, reason
        super().__init__(f"{reason}: {found}")
        self.reason, self.found = reason, found

    def line(self, row: int, problem_id: Any = None) -> dict[str, Any]:
        """Of OUT.refused.jsonl. row: its number in the table."""
        return {
            "row": row,
            **({} if problem_id is None else {"problem_id": problem_id}),
            "reason": self.reason,
            "found": self.found,
            "remedy": REMEDIES[self.reason],
        }
