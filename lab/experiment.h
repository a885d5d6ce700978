// The lab: experiments that measure a paper's claim again, on an ordinary machine. One file a claim.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "heed/mechanism/params.h"

namespace heed::lab {

/// One claim and what was found of it.
struct Finding {
  std::string claim, measured;
  bool holds = false;
};

/// Lines over x = 0 … x_end, each at equal steps of x.
struct Chart {
  std::string title, x_title, y_title;
  double x_end = 1;
  struct Line {
    std::string name;
    std::vector<double> y;
  };
  std::vector<Line> lines;
};

struct Report {
  std::vector<std::string> columns;
  std::vector<std::vector<std::string>> rows;
  std::vector<Finding> findings;
  std::vector<Chart> charts;
  std::string note;  // how it was measured, a sentence or two
};

/// What an experiment is given.
struct Setting {
  const Params& params;
  std::string text;   // a text file
  std::string model;  // a GGUF model, or ""
  /// Called now and then with what is being done; false: stop. Experiments throw Stopped then.
  std::function<bool(const std::string& what, Index done, Index total)> progress;
};

/// Thrown by an experiment whose progress was answered with false.
struct Stopped {};

struct Experiment {
  std::string name, title, paper, question;
  bool needs_model = false;
  std::vector<ParamSpec> params;
  /// Throws Error for files that cannot be used, UsageError for parameters.
  Report (*run)(const Setting& setting);
};

const Experiment& gate();
const Experiment& moba();
const Experiment& moba_continued();

/// All of them, by name.
const std::vector<const Experiment*>& experiments();
/// Throws UsageError that lists the names.
const Experiment& find_experiment(const std::string& name);

}  // namespace heed::lab
