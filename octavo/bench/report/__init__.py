"""The report: results of the workbench as one HTML file that needs no network, in light and dark.

`page` decides what is said, `tables` and `figures` what is shown, `svg` how it is drawn, `intervals` how sure
it is; `report.html.jinja` lays it out.
"""

from octavo.bench.report.page import build, compare_runs, name_runs, write_report

__all__ = ["build", "compare_runs", "name_runs", "write_report"]
