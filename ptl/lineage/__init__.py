"""MLflow: runs, models, versions."""
