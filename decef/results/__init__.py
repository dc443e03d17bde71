"""From records to results/: tables, claims, figures, the report, benchmarks; one file per thing made."""
