"""From records to results/: tables, claims, figures, the report, benchmarks; one file per thing made."""

from decef.extras import need

need("results", "pandas", "tabulate", "scipy", "statsmodels", "jinja2", "matplotlib")
