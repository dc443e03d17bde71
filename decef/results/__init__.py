"""Make results/ from records: tables, claims, figures, the report, benchmarks. One module for each."""

from decef.extras import need

need("results", "pandas", "tabulate", "scipy", "statsmodels", "jinja2", "matplotlib", "vl_convert")
