"""Accuracy by class and confusion matrix, as numbers known by hand."""

from __future__ import annotations

import torch

from common.class_report import BY_CLASS, CONFUSION, ClassReport, write_report


def test_the_tables_of_an_evaluation(tmp_path):
    """A class without images, names with a comma and beyond ASCII, a class of the model that the data does not have."""
    report = ClassReport()
    logits = torch.eye(4)  # predicts its row
    report.add(torch.tensor([0, 0, 1]), logits[[0, 1, 1]])
    report.add(torch.tensor([0, 3]), logits[[0, 0]])
    write_report(tmp_path, "ema_", report.gather(), 4, ["cat, small", "Eule \u00e4", "dog"])
    assert (tmp_path / f"ema_{BY_CLASS}").read_text(encoding="utf-8") == (
        'label,class,images,correct,accuracy\n0,"cat, small",3,2,66.67\n1,Eule \u00e4,1,1,100.00\n2,dog,0,0,\n3,3,1,0,0.00\n'
    )
    assert (tmp_path / f"ema_{CONFUSION}").read_text(encoding="utf-8") == (
        'class / predicted,"cat, small",Eule \u00e4,dog,3\n"cat, small",2,1,0,0\nEule \u00e4,0,1,0,0\ndog,0,0,0,0\n3,1,0,0,0\n'
    )


def test_names_that_are_no_text_are_written_as_they_are(tmp_path):
    """A folder's name in another encoding, as os.fsdecode gives it."""
    report = ClassReport()
    report.add(torch.tensor([0]), torch.ones(1, 1))
    write_report(tmp_path, "", report.gather(), 1, [b"caf\xe9".decode("utf-8", "surrogateescape")])
    assert b"0,caf\xe9,1,1,100.00" in (tmp_path / BY_CLASS).read_bytes()
