"""The report of a run: `page.write_report`."""
