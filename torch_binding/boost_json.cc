// Boost.JSON compiled in, alone in its object file: a program that brings its own copy never pulls this one.
#include <boost/json/src.hpp>
