//! Forecast evaluation: metrics, naive forecasters, skill, plots and reports.
