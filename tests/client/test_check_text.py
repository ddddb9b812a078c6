"""What an operator reads of an intake."""

from client.cli import check_text

FOUND = {
    "found": 5,
    "used": 2,
    "quarantined": [{"file": 1, "code": "truncated"}, {"file": 4, "code": "truncated"}],
    "duplicates": 0,
    "excluded": {"localizer": 1},
    "patients": 2,
    "labels": {"motion": {"present": 1, "absent": 1, "not_assessed": 0}},
    "label_problems": {
        "rows_without_image": {"count": 9, "rows": list(range(2, 11))},
        "wrong-modality": {"count": 0, "rows": []},
        "images_without_label": 3,
        "disputed": 2,
        "incomplete": 0,
    },
    "split": "keyed hash",
}


def test_every_file_and_every_label_that_is_not_used_is_accounted_for():
    text = check_text(FOUND)
    assert "5 files found: 2 used, 2 quarantined, 0 duplicates, 1 excluded by rule" in text
    assert "2 × truncated (file 1, 4 of the sorted list)" in text
    assert "1 × localizer" in text
    assert "9 label rows without an image (row 2, 3, 4, 5, 6, 7, 8, 9, …)" in text
    assert "cannot show" not in text
    assert "3 images without a label row" in text
    assert "2 labels in dispute" in text
    assert "read by too few" not in text
    assert "split: keyed hash" in text
